from __future__ import annotations

import torch

from training.corruptions import Corruption, corrupt, gaussian_noise, salt_pepper
from training.loop import generator


def test_no_corruption_leaves_items_alone() -> None:
    """Without noise the very same tensor comes back."""
    x = torch.rand(4, 1, 8, 8)
    assert corrupt(x, Corruption(), generator(0, "noise")) is x


def test_corruption_is_decided_by_its_generator() -> None:
    """The same seed gives the same noise, another seed another, and every value stays in [0, 1]."""
    x = torch.rand(64, 1, 8, 8)
    corruption = Corruption(gaussian_sigma_max=0.8, masked_fraction_max=0.7, salt_pepper_fraction_max=0.5)
    first, again, other = (corrupt(x, corruption, generator(seed, "noise")) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_strength_differs_by_item() -> None:
    """Blind denoising sees weak and strong noise in one batch."""
    x = torch.full((500, 1, 8, 8), 0.5)
    noisy = corrupt(x, Corruption(gaussian_sigma_max=0.3, masked_weight=0, salt_pepper_weight=0), generator(0, "noise"))
    spread = noisy.flatten(1).std(1)
    assert float(spread.min()) < 0.02
    assert float(spread.max()) > 0.2


def test_salt_pepper_hits_its_fraction() -> None:
    """About the given fraction of the values becomes 0 or 1, the others stay."""
    noisy = salt_pepper(torch.full((100, 1, 10, 10), 0.5), 0.3, generator(0, "noise"))
    assert abs(float((noisy != 0.5).double().mean()) - 0.3) < 0.02
    assert set(noisy.unique().tolist()) == {0.0, 0.5, 1.0}


def test_gaussian_noise_is_clipped() -> None:
    """Noise never leaves the range."""
    noisy = gaussian_noise(torch.zeros(10, 1, 8, 8), 0.5, generator(0, "noise"))
    assert float(noisy.min()) == 0
    assert float(noisy.max()) <= 1
