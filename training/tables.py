"""Files of items as data sets: arrays of pictures or records (.npy, .npz), tables of records (.csv, .parquet)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.artifacts.manifest import PictureSpec
from training.dataset import FEWEST_ITEMS, Dataset
from training.errors import TrainingError

TABLE_SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
ITEM_KEYS = ("items", "x", "images", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "label", "targets")
DEFAULT_LABEL_COLUMN = "label"
MOST_CLASSES = 1000
SHOWN_ROWS = 5


def load_table(path: Path, label_column: str | None) -> Dataset:
    """The items of a file. Raises TrainingError naming what of it cannot be used."""
    if path.suffix.lower() in (".npy", ".npz"):
        items, labels = _arrays(path)
        features = None
    else:
        items, labels, features = _columns(path, label_column)
    if labels is not None and len(labels) != len(items):
        raise TrainingError(f"data {path}: expected a label for each of {len(items)} items, found {len(labels)} labels")
    if items.dtype.kind not in "fiub":
        raise TrainingError(f"data {path}: expected numbers, found {items.dtype}")
    if items.ndim == 2:
        return _records(path, items, labels, features)
    if items.ndim in (3, 4):
        return _pictures(path, items, labels)
    raise TrainingError(
        f"data {path}: expected records (items, features) or pictures (items, height, width[, channels]), "
        f"found {items.shape}"
    )


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            keys = list(loaded.files)
            item_key = next((key for key in ITEM_KEYS if key in keys), keys[0] if len(keys) == 1 else None)
            if item_key is None:
                raise TrainingError(f"data {path}: expected items under {' or '.join(ITEM_KEYS)}, found {keys}")
            label_key = next((key for key in LABEL_KEYS if key in keys), None)
            return loaded[item_key], None if label_key is None else loaded[label_key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TrainingError(f"data {path}: not a readable array file: {error}") from error


def _columns(path: Path, label_column: str | None) -> tuple[NDArray[Any], NDArray[Any] | None, tuple[str, ...]]:
    import pyarrow as pa  # noqa: PLC0415  # slow to import, and only these files need it
    import pyarrow.compute as pc  # noqa: PLC0415  slow to import, and seldom needed
    import pyarrow.csv  # noqa: PLC0415  slow to import, and seldom needed
    import pyarrow.parquet  # noqa: PLC0415  slow to import, and seldom needed

    try:
        table = pa.csv.read_csv(path) if path.suffix.lower() == ".csv" else pa.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise TrainingError(f"data {path}: not a readable table: {error}") from error
    names = list(table.column_names)
    if len(set(names)) < len(names):
        raise TrainingError(f"data {path}: expected columns of different names, found {names[:20]}")
    if label_column is None and DEFAULT_LABEL_COLUMN in names:
        label_column = DEFAULT_LABEL_COLUMN
    if label_column is not None and label_column not in names:
        raise TrainingError(f"label-column: expected one of {', '.join(names[:20])}; found {label_column!r}")
    features = tuple(name for name in names if name != label_column)
    if not features:
        raise TrainingError(f"data {path}: expected columns of numbers beside the label, found none")
    columns = []
    for name in features:
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            example = next((value for value in table.column(name).to_pylist() if value is not None), None)
            raise TrainingError(
                f"data {path}: column {name}: expected numbers, found {kind}, such as {example!r}; name it with "
                "--label-column if it holds the classes, else leave it out of the file"
            )
        columns.append(pc.cast(table.column(name), pa.float64()).to_numpy(zero_copy_only=False))
    labels = None
    if label_column is not None:
        labels = np.array([str(value) for value in table.column(label_column).to_pylist()])
    return np.stack(columns, axis=1), labels, features


def _records(path: Path, items: NDArray[Any], labels: NDArray[Any] | None, features: tuple[str, ...] | None) -> Dataset:
    finite = np.isfinite(items.astype(np.float64)).all(1)
    names = features or tuple(f"x{i}" for i in range(items.shape[1]))
    skipped = []
    for row in np.flatnonzero(~finite).tolist():
        column = names[int(np.flatnonzero(~np.isfinite(items[row].astype(np.float64)))[0])]
        skipped.append(f"row {row}: {column}: expected a number, found none (NaN or infinity)")
    items = items[finite].astype(np.float32)
    _check_count(path, len(items), skipped)
    constant = [name for name, spread in zip(names, np.ptp(items, axis=0), strict=True) if spread == 0]
    notes = [f"columns that never change: {', '.join(constant[:SHOWN_ROWS])}"] if constant else []
    indices, label_names = _classes(path, None if labels is None else labels[finite])
    return Dataset(
        name=path.name,
        items=torch.from_numpy(np.ascontiguousarray(items)),
        labels=indices,
        label_names=label_names,
        is_official_test=None,
        features=names,
        skipped=tuple(skipped),
        notes=tuple(notes),
    )


def _pictures(path: Path, items: NDArray[Any], labels: NDArray[Any] | None) -> Dataset:
    if items.ndim == 3:
        items = items[:, None]
    elif items.shape[1] not in (1, 3) and items.shape[3] in (1, 3):
        items = items.transpose(0, 3, 1, 2)
    if items.shape[1] not in (1, 3):
        raise TrainingError(f"data {path}: expected pictures of 1 or 3 channels, found an array {items.shape}")
    skipped: list[str] = []
    if items.dtype != np.uint8:
        finite = np.isfinite(items.astype(np.float64)).all((1, 2, 3))
        skipped = [f"item {row}: expected numbers, found NaN or infinity" for row in np.flatnonzero(~finite).tolist()]
        items, labels = items[finite], None if labels is None else labels[finite]
        _check_count(path, len(items), skipped)
        low, high = float(items.min()), float(items.max())
        if low < 0 or high > 1:
            raise TrainingError(
                f"data {path}: expected pictures of uint8 0 to 255 or of floats 0 to 1, found {items.dtype} from "
                f"{low:g} to {high:g}"
            )
        items = np.rint(items.astype(np.float64) * 255).astype(np.uint8)
    _check_count(path, len(items), skipped)
    if int(items.max()) <= 1:
        raise TrainingError(
            f"data {path}: expected pictures of uint8 0 to 255 or of floats 0 to 1, found uint8 up to "
            f"{int(items.max())}"
        )
    indices, label_names = _classes(path, labels)
    return Dataset(
        name=path.name,
        items=torch.from_numpy(np.ascontiguousarray(items)),
        labels=indices,
        label_names=label_names,
        is_official_test=None,
        picture=PictureSpec(),
        skipped=tuple(skipped),
    )


def _check_count(path: Path, count: int, skipped: list[str]) -> None:
    if count < FEWEST_ITEMS:
        raise TrainingError(
            f"data {path}: expected at least {FEWEST_ITEMS} usable items, found {count}"
            + (f" and {len(skipped)} that are not, the first: {skipped[0]}" if skipped else "")
        )


def _classes(path: Path, labels: NDArray[Any] | None) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    if labels is None:
        return None, ()
    if labels.ndim != 1:
        raise TrainingError(f"data {path}: expected one label per item, found labels of shape {labels.shape}")
    names, indices = np.unique(labels, return_inverse=True)
    if len(names) > MOST_CLASSES:
        raise TrainingError(
            f"data {path}: expected at most {MOST_CLASSES} classes, found {len(names)} different labels; "
            "is that column a number to learn from?"
        )
    return torch.from_numpy(indices.astype(np.int64)), tuple(str(name) for name in names)
