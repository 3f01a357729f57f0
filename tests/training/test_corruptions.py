from __future__ import annotations

import torch

from training.corruptions import Corruption, corrupt, gaussian_noise, salt_pepper
from training.noise import Noise, generator


def test_no_corruption_leaves_items_alone() -> None:
    """Without noise the very same tensor comes back."""
    x = torch.rand(4, 1, 8, 8)
    assert corrupt(x, Corruption(), Noise(generator(0, "noise"))).x is x


def test_corruption_is_decided_by_its_generator() -> None:
    """The same seed gives the same noise, another seed another, and every value stays in [0, 1]."""
    x = torch.rand(64, 1, 8, 8)
    corruption = Corruption(gaussian_sigma_max=0.8, masked_fraction_max=0.7, salt_pepper_fraction_max=0.5)
    first, again, other = (corrupt(x, corruption, Noise(generator(seed, "noise"))).x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_strength_differs_by_item() -> None:
    """Blind denoising sees weak and strong noise in one batch."""
    x = torch.full((500, 1, 8, 8), 0.5)
    noisy = corrupt(x, Corruption(gaussian_sigma_max=0.3), Noise(generator(0, "noise"))).x
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


def test_holes_are_rectangles_and_told() -> None:
    """A hole is a rectangle of missing values, the same in all channels, and the mask says where it is."""
    x = torch.full((50, 3, 12, 10), 0.5)
    corrupted = corrupt(x, Corruption(hole_side_fraction_max=0.5), Noise(generator(0, "noise")))
    assert corrupted.mask is not None
    assert corrupted.mask.shape == (50, 1, 12, 10)
    assert torch.equal(corrupted.x, x * (1 - corrupted.mask))
    for mask in corrupted.mask[:, 0]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns
        assert 1 <= rows <= 6
        assert 1 <= columns <= 5


def test_records_lose_features() -> None:
    """A record's hole is features at random; standardised values are not clipped."""
    x = torch.full((200, 20), 5.0)
    corrupted = corrupt(x, Corruption(hole_side_fraction_max=0.5), Noise(generator(0, "noise")), limits=None)
    assert corrupted.mask is not None
    assert set(corrupted.x.unique().tolist()) == {0.0, 5.0}
    assert 0.2 < float(corrupted.mask.mean()) < 0.3


def test_a_share_of_the_rows_sees_the_same_noise() -> None:
    """Two processes with half a batch each draw what one process draws for the whole."""
    x = torch.rand(10, 1, 8, 8)
    corruption = Corruption(
        gaussian_sigma_max=0.8, masked_fraction_max=0.7, salt_pepper_fraction_max=0.5, hole_side_fraction_max=0.5
    )
    whole = corrupt(x, corruption, Noise(generator(0, "noise")))
    halves = [
        corrupt(x[rows], corruption, Noise(generator(0, "noise"), rows, 10)) for rows in (slice(0, 5), slice(5, 10))
    ]
    assert torch.equal(torch.cat([half.x for half in halves]), whole.x)
