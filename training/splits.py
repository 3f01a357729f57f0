"""Which item is for training, validation, calibration and test: decided by its content and a seed alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data import Dataset
from training.errors import TrainingError

PARTS = ("train", "validation", "calibration", "test")

FRACTIONS_WITH_OFFICIAL_TEST = {"train": 0.85, "validation": 0.05, "calibration": 0.10}
FRACTIONS = {"train": 0.70, "validation": 0.05, "calibration": 0.10, "test": 0.15}


@dataclass(frozen=True)
class Split:
    """Indices of a data set's items by part; no content is in two parts."""

    train: Tensor
    validation: Tensor
    calibration: Tensor
    test: Tensor
    sha256: str  # over the sorted lines "<content's SHA-256> <part>"

    @property
    def counts(self) -> dict[str, int]:
        """Items by part."""
        return {part: len(getattr(self, part)) for part in PARTS}


def split_dataset(dataset: Dataset, seed: int) -> Split:
    """Splits by SHA-256 of seed and content, so that neither order nor other items move an item to another part.

    An official test part stays whole; an item outside of it that equals a test item is left out of every part. Where
    there is none, 15 % are set apart.

    Raises TrainingError if a part would be empty.
    """
    pixels = dataset.items.contiguous().numpy()
    contents = [hashlib.sha256(item.tobytes()).digest() for item in pixels]
    official = dataset.is_official_test
    in_test = set() if official is None else {contents[i] for i in official.nonzero().flatten().tolist()}
    fractions = FRACTIONS if official is None else FRACTIONS_WITH_OFFICIAL_TEST
    bounds = np.cumsum(list(fractions.values()))
    names = list(fractions)

    assignment: dict[str, list[int]] = {part: [] for part in PARTS}
    lines = set()
    for i, content in enumerate(contents):
        if official is not None and bool(official[i]):
            part = "test"
        elif content in in_test:
            continue
        else:
            draw = hashlib.sha256(f"split {seed} ".encode() + content).digest()
            position = int.from_bytes(draw[:8], "big") / 2**64
            part = names[min(int(np.searchsorted(bounds, position, side="right")), len(names) - 1)]
        assignment[part].append(i)
        lines.add(f"{content.hex()} {part}\n")

    if empty := [part for part in PARTS if not assignment[part]]:
        raise TrainingError(
            f"data {dataset.name}: {len(contents)} items ({len(set(contents))} different ones) leave nothing for "
            f"{' and '.join(empty)}"
        )
    return Split(
        **{part: torch.tensor(indices) for part, indices in assignment.items()},
        sha256=hashlib.sha256("".join(sorted(lines)).encode()).hexdigest(),
    )
