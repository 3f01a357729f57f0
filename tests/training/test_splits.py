from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.data import Dataset
from training.errors import TrainingError
from training.splits import PARTS, split_dataset


def test_split_is_deterministic_disjoint_and_complete(digits: Dataset) -> None:
    """The same seed gives the same parts, which share no item and leave none out; another seed gives others."""
    first, again, other = (split_dataset(digits, seed) for seed in (0, 0, 1))
    indices = torch.cat([getattr(first, part) for part in PARTS])
    assert sorted(indices.tolist()) == list(range(len(digits.items)))
    assert all(torch.equal(getattr(first, part), getattr(again, part)) for part in PARTS)
    assert first.sha256 == again.sha256 != other.sha256


def test_split_ignores_order(digits: Dataset) -> None:
    """Reordered data has the same split hash, and each content its part."""
    reordered = replace(digits, items=digits.items.flip(0), labels=None)
    assert split_dataset(reordered, 0).sha256 == split_dataset(digits, 0).sha256


def test_duplicates_stay_on_one_side(digits: Dataset) -> None:
    """An item that occurs twice is in the same part twice."""
    n = len(digits.items)
    split = split_dataset(replace(digits, items=torch.cat([digits.items, digits.items])), 0)
    for part in PARTS:
        indices = set(getattr(split, part).tolist())
        assert {(i + n) % (2 * n) for i in indices} == indices


def test_official_test_part_stays_whole(digits: Dataset) -> None:
    """An official test part is the test part, and what equals one of its items is trained on by nobody."""
    n = len(digits.items)
    images = torch.cat([digits.items, digits.items[:50]])
    official = torch.arange(n + 50) >= n
    split = split_dataset(replace(digits, items=images, is_official_test=official), 0)
    assert split.test.tolist() == list(range(n, n + 50))
    held = set(torch.cat([split.train, split.validation, split.calibration]).tolist())
    assert not held & set(range(50))


def test_too_few_items_are_refused(digits: Dataset) -> None:
    """A data set of one repeated picture is refused before anything runs."""
    same = digits.items[:1].repeat(30, 1, 1, 1)
    with pytest.raises(TrainingError, match=r"30 items \(1 different ones\) leave nothing for"):
        split_dataset(replace(digits, items=same), 0)
