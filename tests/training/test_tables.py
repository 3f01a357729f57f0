from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from training.data import load_dataset
from training.errors import TrainingError

RANDOM = np.random.default_rng(0)


def load(path: Path, **options: Any) -> Any:
    return load_dataset(str(path), Path("unused"), **options)


def save(path: Path, **arrays: Any) -> Path:
    """An array file: .npy of the one array, .npz of several."""
    if path.suffix == ".npy":
        np.save(path, arrays["items"])
    else:
        np.savez(path, **arrays)
    return path


def table(path: Path, text_rows: list[str]) -> Path:
    path.write_text("\n".join(text_rows) + "\n")
    return path


def test_csv_and_parquet_are_the_same_records(tmp_path: Path) -> None:
    """A table's columns become features, its column `label` the classes, whatever the file's kind."""
    rows = [f"{i},{i * 0.5},{'odd' if i % 2 else 'even'}" for i in range(30)]
    csv = load(table(tmp_path / "t.csv", ["a,b,label", *rows]))
    columns = {"a": list(range(30)), "b": [i * 0.5 for i in range(30)]}
    columns["label"] = ["odd" if i % 2 else "even" for i in range(30)]
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    parquet = load(tmp_path / "t.parquet")
    assert csv.features == parquet.features == ("a", "b")
    assert csv.label_names == parquet.label_names == ("even", "odd")
    assert torch.equal(csv.items, parquet.items)
    assert csv.items.dtype == torch.float32
    assert csv.input_spec.features == ("a", "b")
    assert csv.input_spec.range is None


def test_rows_without_numbers_are_left_out_or_fatal(tmp_path: Path) -> None:
    """NaN, infinity and empty cells are listed by row and column; `--on-bad fail` ends it."""
    rows = [f"{i},{i}" for i in range(30)]
    rows[3], rows[7] = "nan,1", "2,"
    path = table(tmp_path / "t.csv", ["a,b", *rows])
    dataset = load(path)
    assert len(dataset.items) == 28
    assert [line.split(": expected")[0] for line in dataset.skipped] == ["row 3: a", "row 7: b"]
    with pytest.raises(TrainingError, match=r"2 cannot be used, the first: row 3: a.*--on-bad skip"):
        load(path, on_bad="fail")


def test_words_are_named_with_a_way_out(tmp_path: Path) -> None:
    """A column of text is refused by name, and so is a label column that is not there."""
    path = table(tmp_path / "t.csv", ["a,city", *[f"{i},Bonn" for i in range(30)]])
    with pytest.raises(TrainingError, match=r"column city: expected numbers, found string, such as 'Bonn'; .*label"):
        load(path)
    assert load(path, label_column="city").label_names == ("Bonn",)
    with pytest.raises(TrainingError, match=r"label-column: expected one of a, city; found 'town'"):
        load(path, label_column="town")


def test_columns_that_never_change_are_remarked_on(tmp_path: Path) -> None:
    """A constant feature is noted before the first epoch; so is a class that is rare."""
    rows = [f"{i},5,{'rare' if i == 0 else 'usual'}" for i in range(60)]
    remarks = load(table(tmp_path / "t.csv", ["a,b,label", *rows])).remarks
    assert remarks[0] == "columns that never change: b"
    assert remarks[1].startswith("unbalanced: of 60 items few are of rare (1)")


@pytest.mark.parametrize(
    ("shape", "expected"), [((30, 9, 7), (1, 9, 7)), ((30, 9, 7, 3), (3, 9, 7)), ((30, 3, 9, 7), (3, 9, 7))]
)
def test_arrays_of_pictures(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Grey and colour pictures, channels first or last, as bytes or as floats from 0 to 1."""
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    as_bytes = load(save(tmp_path / "a.npz", images=pixels, labels=np.arange(30) % 3))
    as_floats = load(save(tmp_path / "b.npy", items=pixels.astype(np.float32) / 255))
    assert as_bytes.item_shape == expected
    assert as_bytes.label_names == ("0", "1", "2")
    assert torch.equal(as_bytes.items, as_floats.items)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (RANDOM.random((30, 8, 8)) * 255, r"floats 0 to 1, found float64 from .* to 25"),
        (RANDOM.integers(0, 2, (30, 8, 8), dtype=np.uint8), "found uint8 up to 1"),
        (RANDOM.random((30, 8, 8, 4)), r"pictures of 1 or 3 channels, found an array"),
        (RANDOM.random((5, 3)), "at least 20 usable items, found 5"),
        (RANDOM.random(30), r"expected records \(items, features\) or pictures"),
        (np.array(["a"] * 30), "expected numbers, found"),
        (np.full((30, 8, 8), np.nan), "at least 20 usable items, found 0 and 30 that are not"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, items: Any, message: str) -> None:
    """Wrong ranges, shapes and kinds are refused with what was found and what was expected."""
    with pytest.raises(TrainingError, match=message):
        load(save(tmp_path / "a.npy", items=items))


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    """A file that is not what its name says is named."""
    for suffix in ("npy", "npz", "parquet"):
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(TrainingError, match=rf"data .*damaged\.{suffix}: not a readable"):
            load(path)


def test_labels_must_fit(tmp_path: Path) -> None:
    """As many labels as items, and not a different one for each of thousands."""
    with pytest.raises(TrainingError, match="a label for each of 30 items, found 29"):
        load(save(tmp_path / "a.npz", items=RANDOM.random((30, 4)), labels=np.arange(29)))
    with pytest.raises(TrainingError, match="at most 1000 classes, found 1001"):
        load(save(tmp_path / "b.npz", items=RANDOM.random((1001, 4)), labels=np.arange(1001)))
