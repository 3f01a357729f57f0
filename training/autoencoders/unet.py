"""The U-Net: restores pictures at full detail, past any bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from training.autoencoders.autoencoder import Autoencoder, Kind, kind_of
from training.errors import TrainingError
from training.noise import Noise

if TYPE_CHECKING:
    from training.autoencoders.hourglass import Blocks


@dataclass(frozen=True)
class UNet:
    """Widths at half and at a quarter of the picture's resolution."""

    channels: tuple[PositiveInt, PositiveInt] = (48, 96)

    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)


class RestoringUNet(Autoencoder):
    """A residual U-Net on pixel-unshuffled pictures; it is told where values are missing, and nothing else.

    Linear output: a sigmoid in front of the squared error collapsed to black pictures in a pilot.

    Source: Ronneberger et al. 2015, arXiv:1505.04597; pixel-unshuffle: Shi et al. 2016, arXiv:1609.05158.
    """

    capabilities = ()
    latent_dim = None

    def __init__(self, item_shape: tuple[int, ...], blocks: Blocks) -> None:
        super().__init__()
        architecture = blocks.architecture
        if not isinstance(architecture, UNet):
            raise TrainingError("bottleneck: expected one for this architecture, found none")
        if kind_of(item_shape) not in UNet.takes:
            raise TrainingError(f"architecture: takes pictures, found items of {item_shape}")
        pictures = item_shape[0]
        wide, deep = architecture.channels
        self.enter = nn.Conv2d(4 * (pictures + 1), wide, 3, padding=1)
        self.down = nn.Sequential(_Residual(wide), nn.GELU())
        self.halve = nn.Conv2d(wide, deep, 3, stride=2, padding=1)
        self.middle = nn.Sequential(_Residual(deep), _Residual(deep), nn.GELU())
        self.enlarge = nn.Conv2d(deep, 4 * wide, 1)
        self.join = nn.Conv2d(2 * wide, wide, 1)
        self.up = nn.Sequential(_Residual(wide), nn.GELU())
        self.leave = nn.Conv2d(wide, 4 * pictures, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The clean picture's estimate, not clipped: (batch, channels, height, width)."""
        height, width = x.shape[2], x.shape[3]
        padding = [0, -width % 4, 0, -height % 4]
        seen = functional.pad(torch.cat([x, mask], dim=1), padding)
        wide = self.down(self.enter(functional.pixel_unshuffle(seen, 2)))  # half the resolution
        deep = self.middle(self.halve(wide))  # a quarter
        back = functional.pixel_shuffle(self.enlarge(deep), 2)
        wide = self.up(self.join(torch.cat([wide, back], dim=1)))
        change = functional.pixel_shuffle(self.leave(wide), 2)
        return x + change[:, :, :height, :width]

    def reconstruct(self, x: Tensor) -> Tensor:
        """Clean pictures for noisy ones without missing values."""
        return self.restore(x, torch.zeros_like(x[:, :1]))

    def restore(self, x: Tensor, mask: Tensor) -> Tensor:
        """Clean pictures for noisy ones, (batch, *item), 0 to 1; `mask` is 1 where values are missing."""
        return self(x, mask).clamp(0.0, 1.0)  # type: ignore[no-any-return]

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, noise: Noise) -> Tensor:
        """Mean squared error of the unclipped output."""
        del noise
        holes = torch.zeros_like(x[:, :1]) if mask is None else mask
        return (self(x, holes).float() - target).square().mean()  # type: ignore[no-any-return]


class _Residual(nn.Module):
    """x + conv(gelu(conv(gelu(x)))), without normalisation: every row is treated alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # close to the identity at first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.gelu(self.first(functional.gelu(x))))  # type: ignore[no-any-return]
