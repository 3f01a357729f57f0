"""What every kind of data becomes: one tensor of items in memory, with what a manifest must say about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from app.artifacts.manifest import InputSpec, PictureSpec

LIGHT_ON_DARK = PictureSpec(fit="pad", resample="bilinear", polarity="light_on_dark")
FEWEST_ITEMS = 20
RARE_SHARE = 0.1  # of an even share: a class below it is remarked on


@dataclass(frozen=True)
class Dataset:
    """Pictures of one size, or records of the same features."""

    name: str
    items: Tensor  # uint8, (items, channels, height, width), or float32, (items, features)
    labels: Tensor | None  # int64, (items,)
    label_names: tuple[str, ...]
    is_official_test: Tensor | None  # bool, (items,); None: the set comes without a test part
    picture: PictureSpec | None = None
    features: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()  # files or rows that could not be used, each with its reason
    notes: tuple[str, ...] = ()  # what the user should know before the first epoch

    @property
    def item_shape(self) -> tuple[int, ...]:
        """(channels, height, width) or (features,)."""
        return tuple(self.items.shape[1:])

    @property
    def input_spec(self) -> InputSpec:
        """What the manifest says of an item."""
        return InputSpec(
            shape=self.item_shape,
            range=None if self.picture is None else (0.0, 1.0),
            picture=self.picture,
            features=self.features,
        )

    @property
    def sha256(self) -> str:
        """Of the shape and all values, in order."""
        digest = hashlib.sha256(repr(tuple(self.items.shape)).encode())
        digest.update(self.items.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Its notes, and classes that are rare."""
        if self.labels is None:
            return self.notes
        counts = torch.bincount(self.labels, minlength=len(self.label_names))
        rare = counts < RARE_SHARE * len(self.labels) / len(self.label_names)
        if not bool(rare.any()):
            return self.notes
        shown = ", ".join(f"{self.label_names[i]} ({int(counts[i])})" for i in rare.nonzero().flatten().tolist()[:5])
        return (
            *self.notes,
            f"unbalanced: of {len(self.labels)} items few are of {shown}; they weigh little in training",
        )


def to_float(items: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1], by the same division that serving uses; float32 items as they are."""
    return items.to(torch.float32) / 255 if items.dtype == torch.uint8 else items
