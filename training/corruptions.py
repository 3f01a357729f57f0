"""Noise on batches of tensors, drawn from a given generator: what a denoising autoencoder learns to undo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat
from torch import Tensor


@dataclass(frozen=True)
class Corruption:
    """Which noise each training item gets: one kind, drawn by the weights, of a strength drawn from 0 to its maximum.

    All maxima zero: none. The network is never told kind or strength, so it denoises blindly.
    """

    gaussian_sigma_max: NonNegativeFloat = 0.0
    masked_fraction_max: NonNegativeFloat = 0.0
    salt_pepper_fraction_max: NonNegativeFloat = 0.0
    gaussian_weight: NonNegativeFloat = 0.6
    masked_weight: NonNegativeFloat = 0.2
    salt_pepper_weight: NonNegativeFloat = 0.2

    @property
    def is_none(self) -> bool:
        """Whether items are left as they are."""
        return not (self.gaussian_sigma_max or self.masked_fraction_max or self.salt_pepper_fraction_max)


def corrupt(x: Tensor, corruption: Corruption, noise: torch.Generator) -> Tensor:
    """Each item of x, (batch, *item) in [0, 1], with its own kind and strength of noise, clipped to [0, 1]."""
    if corruption.is_none:
        return x
    per_item = (len(x), *[1] * (x.dim() - 1))
    kinds = torch.tensor(
        [corruption.gaussian_weight, corruption.masked_weight, corruption.salt_pepper_weight], device=x.device
    )
    kind = torch.multinomial(kinds, len(x), replacement=True, generator=noise).view(per_item)
    strength = torch.rand(per_item, generator=noise, device=x.device)
    gaussian = gaussian_noise(x, strength * corruption.gaussian_sigma_max, noise)
    chance = torch.rand(x.shape, generator=noise, device=x.device)
    masked = torch.where(chance < strength * corruption.masked_fraction_max, 0.0, x)
    speckled = _salt_pepper(x, strength * corruption.salt_pepper_fraction_max, chance)
    return torch.where(kind == 0, gaussian, torch.where(kind == 1, masked, speckled))


def gaussian_noise(x: Tensor, sigma: Tensor | float, noise: torch.Generator) -> Tensor:
    """X in [0, 1] with additive Gaussian noise of standard deviation `sigma`, clipped to [0, 1]."""
    return (x + sigma * torch.randn(x.shape, generator=noise, device=x.device)).clamp(0, 1)


def salt_pepper(x: Tensor, fraction: float, noise: torch.Generator) -> Tensor:
    """X in [0, 1] with this fraction of its values set to 0 or 1, each half the time."""
    return _salt_pepper(x, fraction, torch.rand(x.shape, generator=noise, device=x.device))


def _salt_pepper(x: Tensor, fraction: Tensor | float, chance: Tensor) -> Tensor:
    return torch.where(chance < fraction / 2, 0.0, torch.where(chance > 1 - fraction / 2, 1.0, x))
