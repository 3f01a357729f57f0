"""Data sets by name, and whatever lies in a folder or a file. Knows where items come from, nothing of networks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from app.artifacts.manifest import PictureSpec
from training.dataset import LIGHT_ON_DARK, Dataset, to_float
from training.errors import TrainingError
from training.folders import load_folder
from training.tables import TABLE_SUFFIXES, load_table

__all__ = ["TORCHVISION_SETS", "Dataset", "default_data_root", "load_dataset", "to_float"]

TORCHVISION_SETS = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
}
"""Names of `--data` and torchvision's classes; each class takes root, train and download, and has data and targets."""

DOWNLOAD_TIMEOUT_S = 20.0


def load_dataset(
    name: str,
    data_root: Path,
    *,
    image_size_px: tuple[int, int] | None = None,
    channels: int | None = None,
    label_column: str | None = None,
    on_bad: Literal["skip", "fail"] = "skip",
) -> Dataset:
    """A data set by its name, a folder of pictures or a file of items by its path.

    Args:
        name: `digits`, one of TORCHVISION_SETS, or a path.
        data_root: torchvision's `root`.
        image_size_px: (height, width) that the pictures of a folder are brought to; by default their most common
            size, shrunk to a longer side of 128.
        channels: 1 (grey) or 3 (RGB) for a folder; by default 1 if every picture is grey.
        label_column: of a .csv or .parquet file; by default `label` if there is such a column.
        on_bad: whether unreadable files and rows with missing numbers are left out, or end it all.

    Raises TrainingError.
    """
    path = Path(name).expanduser()
    is_set = name == "digits" or name in TORCHVISION_SETS
    is_table = path.suffix.lower() in TABLE_SUFFIXES and not is_set
    if (image_size_px is not None or channels is not None) and (is_set or is_table):
        raise TrainingError(f"image size and channels: only for folders of pictures, found data {name}")
    if label_column is not None and not is_table:
        raise TrainingError(f"label-column: only for {' and '.join(TABLE_SUFFIXES)} files, found data {name}")
    if is_set:
        return _load_digits() if name == "digits" else _load_torchvision(name, data_root)
    if path.is_dir():
        dataset = load_folder(path, image_size_px, channels)
    elif is_table and path.is_file():
        dataset = load_table(path, label_column)
    else:
        known = ", ".join(["digits", *TORCHVISION_SETS])
        raise TrainingError(
            f"data: expected one of {known}, a folder of pictures, or a {', '.join(TABLE_SUFFIXES)} file; "
            f"found {name!r}, which is neither"
        )
    if dataset.skipped and on_bad == "fail":
        raise TrainingError(
            f"data {name}: {len(dataset.skipped)} cannot be used, the first: {dataset.skipped[0]}; "
            "--on-bad skip leaves them out"
        )
    return dataset


def _load_digits() -> Dataset:
    """scikit-learn's 1797 digits of 8×8 pixels, 0…16 scaled to 0…255."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  # slow to import, and only this set needs it

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # (1797, 1, 8, 8)
    return Dataset(
        name="digits",
        items=torch.from_numpy(images),
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        label_names=tuple(str(digit) for digit in range(10)),
        is_official_test=None,
        picture=LIGHT_ON_DARK,
    )


def _load_torchvision(name: str, root: Path) -> Dataset:
    import torchvision.datasets  # noqa: PLC0415  # slow to import, and only these sets need it

    make = getattr(torchvision.datasets, TORCHVISION_SETS[name])
    parts = [_open_or_download(make, name, root, train=train) for train in (True, False)]
    pixels = [torch.as_tensor(part.data) for part in parts]
    images = torch.cat(pixels)
    # Grey sets are (items, height, width), colour sets (items, height, width, channels).
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Dataset(
        name=name,
        items=images,
        labels=torch.cat([torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]),
        label_names=tuple(str(label) for label in parts[0].classes),
        is_official_test=torch.arange(len(images)) >= len(pixels[0]),
        picture=LIGHT_ON_DARK if images.shape[1] == 1 else PictureSpec(),
    )


def _open_or_download(make: Any, name: str, root: Path, *, train: bool) -> Any:
    try:
        return make(root=str(root), train=train, download=False)
    except RuntimeError:  # torchvision's word for: not there
        pass
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            return make(root=str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"data {name}: not found under {root.resolve()}, and the download failed ({error}). Put torchvision's "
            f"files there, or name the folder that has them with --data-root or HOURGLASS_DATA_ROOT; "
            "`--data digits` needs no download"
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def default_data_root() -> Path:
    """Torchvision's root unless an option names another: HOURGLASS_DATA_ROOT, else `data`."""
    return Path(os.environ.get("HOURGLASS_DATA_ROOT") or "data")
