"""Bodies of numbers alone, read without an object for each: the same rows as the slow way, or left to it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.artifacts.manifest import InputSpec
from app.codecs.bodies import Body
from app.codecs.items import Limits, read_items
from app.codecs.numbers import _parser, parse_rows
from app.errors import ServiceError

SHAPE = (1, 2, 3)
LIMITS = Limits(max_rows=64, max_image_pixels=1)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("nested", [True, False])
def test_rows(count: int, nested: bool) -> None:
    rows = np.random.default_rng(0).random((count, *SHAPE)).astype(np.float32)
    body = orjson.dumps({"instances": rows if nested else rows.reshape(count, -1)}, option=orjson.OPT_SERIALIZE_NUMPY)
    found = parse_rows(body, SHAPE, (0, 1))
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize(
    "text",
    [
        '{"instances": []}',
        '{"instances": [[]]}',
        '{"instances": [1, 2, 3, 4, 5, 6]}',
        '{"instances": [[1, 2, 3, 4, 5]]}',
        '{"instances": [[1, 2, 3, 4, 5, [6]]]}',
        '{"instances": [[[1], 2, 3, 4, 5, 6]]}',
        '{"instances": [[1, 2, 3], [4, 5, 6]]}',
        '{"instances": [[[[1, 2, 3], [4, 5]]], [[[6]]]]}',
        '{"instances": [[[[1, 2], [3, 4], [5, 6]]]]}',
        '{"instances": [[[[1, 2, 3, 4], [5, 6]]]]}',
        '{"instances": [[1, 2, 3, 4, 5, true]]}',
        '{"instances": [[1, 2, 3, 4, 5, null]]}',
        '{"instances": [[1, 2, 3, 4, 5, "6"]]}',
        '{"instances": [[1, 2, 3, 4, 5, NaN]]}',
        '{"instances": [[1, 2, 3, 4, 5, 1e400]]}',
        '{"instances": [[1, 2, 3, 4, 5, 18446744073709551616]]}',
        '{"instances": [[1, 2, 3, 4, 5, 06]]}',
        '{"instances": [[1, 2, 3, 4, 5, {}]]}',
        '{"instances": [[1, 2, 3, 4, 5, 6]]',
        '{"instances": [[1, 2, 3, 4, 5, 6]]} x',
        '{"instances": 6}',
        '{"others": [[1, 2, 3, 4, 5, 6]]}',
        '{"instances": [[1, 2, 3, 4, 5, 6]], "instances": [[6, 5, 4, 3, 2, 1]]}',
        '{"instances": [[1, 2, 3, 4, 5, 6]], "ids": [1]}',
        "[[1, 2, 3, 4, 5, 6]]",
        "",
    ],
)
def test_everything_else_is_left_to_the_slow_way(text: str) -> None:
    assert parse_rows(text.encode(), SHAPE, None) is None


@pytest.mark.parametrize("number", ["-1e39", "1.0000001", "-1e-9"])
def test_what_lies_outside_the_range_is_left_to_the_slow_way(number: str) -> None:
    assert parse_rows(f'{{"instances": [[1, 0, 1, 0, 1, {number}]]}}'.encode(), SHAPE, (0, 1)) is None
    assert (parse_rows(f'{{"instances": [[1, 2, 3, 4, 5, {number}]]}}'.encode(), SHAPE, None) is None) == (
        number == "-1e39"
    )


def test_only_small_bodies_leave_memory_behind() -> None:
    assert _parser(1000) is _parser(2000)
    assert _parser(10**6) is not _parser(10**6)
    large = np.random.default_rng(0).random((500, *SHAPE), dtype=np.float32).repeat(20, axis=0)
    body = orjson.dumps({"instances": large}, option=orjson.OPT_SERIALIZE_NUMPY)
    assert len(body) > 256 * 1024
    np.testing.assert_array_equal(parse_rows(body, SHAPE, (0, 1)), large)


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, 1, 0.5, -0.0, 1e-320, 3.5e38, True, None, "1", [], [0.5]]),
)


@given(
    st.recursive(st.lists(NUMBERS, min_size=6, max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    | st.lists(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6), max_size=3)
)
def test_both_ways_agree(instances: list[Any]) -> None:
    """Whatever the fast way takes, the slow way takes for the same; a member beside it forces the slow way."""
    spec = InputSpec(shape=SHAPE, range=None, features=None)
    data = json.dumps({"instances": instances}).encode()
    slowly = json.dumps({"instances": instances, "ids": list(range(len(instances)))}).encode()
    answers = []
    for body in (data, slowly):
        try:
            answers.append(np.stack([*read_items(Body(body, "application/json", {}), spec, LIMITS).entries]))
        except ServiceError as error:
            answers.append((type(error), str(error)))
    if isinstance(answers[0], tuple):
        assert answers[0] == answers[1]
    else:
        np.testing.assert_array_equal(*answers)
