"""A folder of pictures as a data set: every one through the function that the service uses."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags
from torch import Tensor

from app.artifacts.manifest import InputSpec, PictureSpec
from app.artifacts.pictures import open_picture, picture_to_input
from app.errors import ServiceError
from training.dataset import FEWEST_ITEMS, Dataset
from training.errors import TrainingError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
LONGEST_DEFAULT_SIDE_PX = 128
MOST_BYTES = 8 * 1024**3


def load_folder(folder: Path, image_size_px: tuple[int, int] | None, channels: int | None) -> Dataset:
    """Every picture below a folder, labelled by the first sub-folder on its path if all lie in one."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    if not paths:
        raise TrainingError(f"data {folder}: expected pictures ({', '.join(PICTURE_SUFFIXES)}), found none")
    skipped: dict[Path, str] = {}
    usual, notes = _usual_size(paths, skipped)
    size = image_size_px or usual
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
        items=images,
        labels=labels,
        label_names=label_names,
        is_official_test=None,
        picture=PictureSpec(),
        skipped=tuple(f"{path.relative_to(folder)}: {why}" for path, why in sorted(skipped.items())),
        notes=tuple(f"{note}; all become {size[0]} × {size[1]}" for note in notes),
    )


def _usual_size(paths: list[Path], skipped: dict[Path, str]) -> tuple[tuple[int, int], list[str]]:
    """(height, width): the most common size, shrunk until its longer side is at most LONGEST_DEFAULT_SIDE_PX.

    The second is a note on sizes, if there are several.
    """
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
    smallest, largest = (f"{h} × {w}" for h, w in (min(sizes, key=math.prod), max(sizes, key=math.prod)))
    notes = [f"mixed sizes: {len(sizes)}, from {smallest} to {largest} pixels"] if len(sizes) > 1 else []
    return (max(1, round(height * scale)), max(1, round(width * scale))), notes


def _labels(folder: Path, paths: list[Path]) -> tuple[Tensor | None, tuple[str, ...]]:
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) < 2 for part in parts):
        return None, ()
    names = tuple(sorted({part[0] for part in parts}))
    return torch.tensor([names.index(part[0]) for part in parts]), names
