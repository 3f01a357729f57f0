"""Data sets as one in-memory tensor of uint8 pictures. Knows where pictures come from, nothing of networks."""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags
from torch import Tensor

from app.artifacts.manifest import InputSpec, PictureSpec
from app.artifacts.pictures import open_picture, picture_to_input
from app.errors import ServiceError
from training.errors import TrainingError

TORCHVISION_SETS = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
}
"""Names of `--data` and torchvision's classes; each class takes root, train and download, and has data and targets."""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
LONGEST_DEFAULT_SIDE_PX = 128
FEWEST_ITEMS = 20
MOST_BYTES = 8 * 1024**3
DOWNLOAD_TIMEOUT_S = 20.0

_LIGHT_ON_DARK = PictureSpec(fit="pad", resample="bilinear", polarity="light_on_dark")


@dataclass(frozen=True)
class Dataset:
    """Pictures of one size in memory, with what a manifest must say about them."""

    name: str
    images: Tensor  # uint8, (items, channels, height, width)
    labels: Tensor | None  # int64, (items,)
    label_names: tuple[str, ...]
    is_official_test: Tensor | None  # bool, (items,); None: the set comes without a test part
    picture: PictureSpec
    skipped: tuple[str, ...] = ()  # files that could not be read, each with its reason

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def input_spec(self) -> InputSpec:
        """What the manifest says of an item."""
        return InputSpec(shape=self.item_shape, range=(0.0, 1.0), picture=self.picture)

    @property
    def sha256(self) -> str:
        """Of the shape and all pixels, in order."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        return digest.hexdigest()


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1], by the same division that serving uses."""
    return images.to(torch.float32) / 255


def load_dataset(
    name: str, data_root: Path, *, image_size_px: tuple[int, int] | None = None, channels: int | None = None
) -> Dataset:
    """A data set by its name, or a folder of pictures by its path.

    Args:
        name: `digits`, one of TORCHVISION_SETS, or a path.
        data_root: torchvision's `root`.
        image_size_px: (height, width) that the pictures of a folder are brought to; by default their most common
            size, shrunk to a longer side of 128.
        channels: 1 (grey) or 3 (RGB) for a folder; by default 1 if every picture is grey.

    Raises TrainingError.
    """
    if name == "digits" or name in TORCHVISION_SETS:
        if image_size_px is not None or channels is not None:
            raise TrainingError(f"image size and channels: only for folders of pictures, found data set {name}")
        return _load_digits() if name == "digits" else _load_torchvision(name, data_root)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load_folder(folder, image_size_px, channels)
    known = ", ".join(["digits", *TORCHVISION_SETS])
    raise TrainingError(f"data: expected one of {known}, or a folder of pictures; found {name!r}, which is neither")


def _load_digits() -> Dataset:
    """scikit-learn's 1797 digits of 8×8 pixels, 0…16 scaled to 0…255."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  # slow to import, and only this set needs it

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # (1797, 1, 8, 8)
    return Dataset(
        name="digits",
        images=torch.from_numpy(images),
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        label_names=tuple(str(digit) for digit in range(10)),
        is_official_test=None,
        picture=_LIGHT_ON_DARK,
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
        images=images,
        labels=torch.cat([torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]),
        label_names=tuple(str(label) for label in parts[0].classes),
        is_official_test=torch.arange(len(images)) >= len(pixels[0]),
        picture=_LIGHT_ON_DARK if images.shape[1] == 1 else PictureSpec(),
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


def _load_folder(folder: Path, image_size_px: tuple[int, int] | None, channels: int | None) -> Dataset:
    """Every picture below a folder, labelled by the first sub-folder on its path if all lie in one."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    if not paths:
        raise TrainingError(f"data {folder}: expected pictures ({', '.join(PICTURE_SUFFIXES)}), found none")
    skipped: dict[Path, str] = {}
    size = image_size_px or _usual_size(paths, skipped)
    if len(paths) * math.prod(size) * 3 > MOST_BYTES:
        raise TrainingError(
            f"data {folder}: {len(paths)} pictures of {size[0]} × {size[1]} pixels need more than "
            f"{MOST_BYTES // 1024**3} GB of memory; choose a smaller --image-size"
        )
    # In colour first: whether a picture stored as RGB is grey shows only in its pixels.
    spec = InputSpec(shape=(channels or 3, *size), range=(0.0, 1.0), picture=PictureSpec())
    pictures: list[NDArray[np.uint8]] = []
    used: list[Path] = []
    for path in paths:
        try:
            unit = picture_to_input(open_picture(path.read_bytes()), spec)
        except (ServiceError, OSError) as error:
            skipped[path] = str(error)
            continue
        pictures.append(np.rint(unit * 255).astype(np.uint8))
        used.append(path)
    if len(pictures) < FEWEST_ITEMS:
        raise TrainingError(
            f"data {folder}: expected at least {FEWEST_ITEMS} readable pictures, found {len(pictures)}"
            + (f" and {len(skipped)} unreadable, the first: {next(iter(skipped.items()))}" if skipped else "")
        )
    # Pictures come with their channels last in memory, and a convolution rounds differently for that.
    images = torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))
    if channels is None and bool((images == images[:, :1]).all()):
        images = images[:, :1].contiguous()
    labels, label_names = _labels(folder, used)
    return Dataset(
        name=folder.resolve().name,
        images=images,
        labels=labels,
        label_names=label_names,
        is_official_test=None,
        picture=PictureSpec(),
        skipped=tuple(f"{path.relative_to(folder)}: {why}" for path, why in sorted(skipped.items())),
    )


def _usual_size(paths: list[Path], skipped: dict[Path, str]) -> tuple[int, int]:
    """(height, width): the most common size, shrunk until its longer side is at most LONGEST_DEFAULT_SIDE_PX."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in paths:
        try:
            picture = open_picture(path.read_bytes())
            width, height = picture.size
            lies_on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        except Exception as error:  # noqa: BLE001  # Pillow's plugins raise whatever a damaged file leads them to
            skipped[path] = str(error)
            continue
        if lies_on_its_side:
            width, height = height, width
        sizes[height, width] += 1
    if not sizes:
        raise TrainingError(f"data: expected readable pictures, found {len(skipped)} unreadable ones")
    (height, width), _ = min(sizes.items(), key=lambda item: (-item[1], item[0]))
    scale = min(1.0, LONGEST_DEFAULT_SIDE_PX / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _labels(folder: Path, paths: list[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) < 2 for part in parts):
        return None, ()
    names = tuple(sorted({part[0] for part in parts}))
    return torch.tensor([names.index(part[0]) for part in parts]), names


def default_data_root() -> Path:
    """Torchvision's root unless an option names another: HOURGLASS_DATA_ROOT, else `data`."""
    return Path(os.environ.get("HOURGLASS_DATA_ROOT") or "data")
