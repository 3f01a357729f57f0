"""Noise on batches of tensors, drawn from a given source: what a denoising autoencoder learns to undo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from training.noise import Noise

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Corruption:
    """Which noise each training item gets: one kind, drawn by the weights, of a strength drawn from 0 to its maximum.

    All maxima zero: none. The network is told where a hole is, but no kind and no strength: it denoises blindly.
    """

    gaussian_sigma_max: NonNegativeFloat = 0.0
    masked_fraction_max: Fraction = 0.0
    salt_pepper_fraction_max: Fraction = 0.0
    hole_side_fraction_max: Fraction = 0.0  # of the picture's sides; of the features of a record
    gaussian_weight: NonNegativeFloat = 0.6
    masked_weight: NonNegativeFloat = 0.2
    salt_pepper_weight: NonNegativeFloat = 0.2
    hole_weight: NonNegativeFloat = 0.2

    @property
    def is_none(self) -> bool:
        """Whether items are left as they are."""
        return not (self.removes_noise or self.hole_side_fraction_max)

    @property
    def removes_noise(self) -> bool:
        """Whether a network trained so learns to denoise."""
        return bool(self.gaussian_sigma_max or self.masked_fraction_max or self.salt_pepper_fraction_max)


@dataclass(frozen=True)
class Corrupted:
    """Items with noise, and where there are holes: 1 at missing values, None where no item can have a hole."""

    x: Tensor  # (batch, *item)
    mask: Tensor | None  # (batch, 1, height, width) or (batch, features)


def corrupt(
    x: Tensor, corruption: Corruption, noise: Noise, limits: tuple[float, float] | None = (0.0, 1.0)
) -> Corrupted:
    """Each item of x, (batch, *item), with its own kind and strength of noise.

    Args:
        limits: what values are clipped to, lowest and highest being also pepper and salt. None for standardised
            values: nothing is clipped, pepper and salt are −3 and 3. Masked values and holes become 0.
    """
    if corruption.is_none:
        return Corrupted(x, None)
    rows, shape = len(x), tuple(x.shape[1:])
    per_item = (rows, *[1] * len(shape))
    weights = torch.tensor(
        [
            corruption.gaussian_weight * bool(corruption.gaussian_sigma_max),
            corruption.masked_weight * bool(corruption.masked_fraction_max),
            corruption.salt_pepper_weight * bool(corruption.salt_pepper_fraction_max),
            corruption.hole_weight * bool(corruption.hole_side_fraction_max),
        ]
    )
    bounds = (weights / weights.sum()).cumsum(0).tolist()
    drawn = noise.uniform(rows).view(per_item)
    strength = noise.uniform(rows).view(per_item)
    normal, chance = noise.normal(rows, *shape), noise.uniform(rows, *shape)
    noisy = x + strength * corruption.gaussian_sigma_max * normal
    low, high = limits or (-3.0, 3.0)
    if limits is not None:
        noisy = noisy.clamp(low, high)
    masked = torch.where(chance < strength * corruption.masked_fraction_max, 0.0, x)
    fraction = strength * corruption.salt_pepper_fraction_max
    speckled = _salt_pepper(x, fraction, chance, low, high)
    result = torch.where(
        drawn < bounds[0], noisy, torch.where(drawn < bounds[1], masked, torch.where(drawn < bounds[2], speckled, x))
    )
    if not corruption.hole_side_fraction_max:
        return Corrupted(result, None)
    holes = _holes(shape, corruption.hole_side_fraction_max, noise, rows) * (drawn >= bounds[2])
    return Corrupted(result * (1 - holes), holes)


def gaussian_noise(x: Tensor, sigma: Tensor | float, noise: torch.Generator) -> Tensor:
    """X in [0, 1] with additive Gaussian noise of standard deviation `sigma`, clipped to [0, 1]."""
    return (x + sigma * torch.randn(x.shape, generator=noise, device=x.device)).clamp(0, 1)


def salt_pepper(x: Tensor, fraction: float, noise: torch.Generator) -> Tensor:
    """X in [0, 1] with this fraction of its values set to 0 or 1, each half the time."""
    return _salt_pepper(x, fraction, torch.rand(x.shape, generator=noise, device=x.device), 0.0, 1.0)


def masking(x: Tensor, fraction: float, noise: torch.Generator) -> Tensor:
    """X with this fraction of its values set to 0."""
    return torch.where(torch.rand(x.shape, generator=noise, device=x.device) < fraction, 0.0, x)


def hole(x: Tensor, side: int, noise: torch.Generator) -> Tensor:
    """A mask with a square hole of that side somewhere in each picture of x, (batch, 1, height, width)."""
    rows, _, height, width = x.shape
    top = (torch.rand(rows, 1, 1, 1, generator=noise) * (height - side + 1)).floor()
    left = (torch.rand(rows, 1, 1, 1, generator=noise) * (width - side + 1)).floor()
    y, x_ = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    return ((y >= top) & (y < top + side) & (x_ >= left) & (x_ < left + side)).float()


def _salt_pepper(x: Tensor, fraction: Tensor | float, chance: Tensor, low: float, high: float) -> Tensor:
    return torch.where(chance < fraction / 2, low, torch.where(chance > 1 - fraction / 2, high, x))


def _holes(shape: tuple[int, ...], side_max: float, noise: Noise, rows: int) -> Tensor:
    """A rectangle per picture, its sides up to so large a part of the picture's; of a record, features at random."""
    if len(shape) == 1:
        share = noise.uniform(rows, 1) * side_max
        return (noise.uniform(rows, *shape) < share).float()
    _, height, width = shape
    corner, size = noise.uniform(rows, 2), noise.uniform(rows, 2) * side_max
    inside = []
    for axis, side in enumerate((height, width)):
        extent = (size[:, axis] * side).ceil()[:, None]
        first = (corner[:, axis, None] * (side - extent + 1)).floor()
        position = torch.arange(side, device=corner.device)
        inside.append((position >= first) & (position < first + extent))  # (rows, side)
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()  # (rows, 1, height, width)
