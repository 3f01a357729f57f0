"""Streams at the level of bytes: CSV of records, long lines, and what a reader holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.artifacts.manifest import InputSpec
from app.codecs.items import Limits
from app.codecs.streams import CsvReader, NdjsonReader, StreamItem
from app.errors import InvalidInput, MalformedPayload, ServiceError, ShapeMismatch

RECORD = InputSpec(shape=(3,), features=("a", "b", "id3"))


def read(reader: Any, data: bytes, size: int) -> list[StreamItem]:
    found = []
    for start in range(0, len(data), size):
        found += reader.feed(data[start : start + size])
    return found + list(reader.end())


def values(item: StreamItem) -> Any:
    return str(item.entry) if isinstance(item.entry, ServiceError) else np.asarray(item.entry).tolist()


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_csv_of_records(size: int) -> None:
    """Columns stand in any order, an id comes back, and a line that is none fails alone."""
    data = b'\xef\xbb\xbfb,id,a,id3\r\n2,x,1,3\n\n5,"y, z",4,6e0\r\n1,u,2\n1,v,nan,2\n1,w,one,2\n1,,1_0,2\n8,last,7,9'
    found = read(CsvReader(RECORD, 1000), data, size)
    assert [item.id for item in found] == ["x", "y, z", None, "v", "w", "", "last"]
    assert [values(item) for item in found] == [
        [1, 2, 3],
        [4, 5, 6],
        "item 2: expected 4 cells, found 3",
        "item 3: expected finite numbers, found NaN",
        "item 4: expected numbers, found 'one'",
        "item 5: expected numbers, found '1_0'",
        [7, 8, 9],
    ]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", MalformedPayload, "expected a line of feature names"),
        (b"a,b,c\n1,2,3\n", InvalidInput, r"unknown columns \['c'\], missing columns \['id3'\]"),
        (b"a,b,b\n", InvalidInput, "more than one column"),
        (b"\xff\xfe\n", MalformedPayload, "not CSV in UTF-8"),
        (b'a,"b\n', MalformedPayload, "not CSV"),
    ],
)
def test_csv_needs_its_first_line(data: bytes, error: type[ServiceError], message: str) -> None:
    """Columns that are unknown, missing or doubled refuse the whole stream."""
    with pytest.raises(error, match=message):
        read(CsvReader(RECORD, 1000), data, 3)


def test_csv_without_feature_names_counts_its_columns() -> None:
    """Where a model names no features, a record is as many columns as it has."""
    spec = InputSpec(shape=(2,))
    assert [values(item) for item in read(CsvReader(spec, 100), b"x,y\n1,2\n", 100)] == [[1, 2]]
    with pytest.raises(ShapeMismatch, match="expected 2 columns, found 3"):
        read(CsvReader(spec, 100), b"x,y,z\n", 100)


def test_a_line_without_end_is_not_kept() -> None:
    """A line longer than it may be fails alone, and nothing of it is held."""
    reader = NdjsonReader(InputSpec(shape=(2,)), Limits(1, 1), 100, masked=False)
    found = []
    for _ in range(1000):
        found += reader.feed(b"1" * 1000)
    assert sum(map(len, reader._lines._parts)) <= 100
    found += [*reader.feed(b"\n[1, 2]\n"), *reader.end()]
    assert [values(item) for item in found] == ["item 0: expected at most 100 bytes a line, found more", [1, 2]]


def test_records_are_instances() -> None:
    """An object by feature name is an instance, also where a feature is called instance."""
    spec = InputSpec(shape=(2,), features=("instance", "x"))
    reader = NdjsonReader(spec, Limits(1, 1), 100, masked=False)
    assert [values(item) for item in reader.feed(b'{"instance": 1, "x": 2}\n')] == [[1, 2]]
    assert [
        values(item)
        for item in NdjsonReader(RECORD, Limits(1, 1), 100, masked=False).feed(
            b'{"id": 5, "instance": {"a": 1, "b": 2, "id3": 3}}\n{"a": 1, "b": 2, "id3": 3}\n'
        )
    ] == [[1, 2, 3]] * 2
