"""The U-Net: restores pictures at full detail, past any bottleneck."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from app.artifacts.manifest import Capability
from training.autoencoders.autoencoder import Autoencoder, Kind, kind_of
from training.autoencoders.bottlenecks import Surroundings
from training.corruptions import Corrupted, Corruption, corrupt
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

    capabilities: tuple[Capability, ...] = ()
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
        return self(x, mask).clamp(0.0, 1.0)

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, noise: Noise) -> Tensor:
        """Mean squared error of the unclipped output."""
        del noise
        holes = torch.zeros_like(x[:, :1]) if mask is None else mask
        return (self(x, holes).float() - target).square().mean()


class InspectingUNet(RestoringUNet):
    """Answers for each square of a picture what its surroundings let expect; what it cannot tell is what is unusual."""

    capabilities = (Capability.RECONSTRUCT, Capability.ANOMALY_SCORE, Capability.ANOMALY_MAP)
    __jit_ignored_attributes__: ClassVar[list[str]] = [*RestoringUNet.__jit_ignored_attributes__, "_config"]
    if TYPE_CHECKING:
        cells: Tensor

    def __init__(self, item_shape: tuple[int, ...], blocks: Blocks) -> None:
        super().__init__(item_shape, blocks)
        config = blocks.bottleneck
        if not isinstance(config, Surroundings):
            raise TrainingError("bottleneck: expected surroundings")
        self._config = config
        y, x = (torch.arange(side) // config.cell_px % 2 for side in item_shape[1:])
        place = 2 * y[:, None] + x[None, :]  # (height, width), 0 to 3
        self.register_buffer("cells", torch.stack([(place == which).float() for which in range(4)])[:, None])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Every square as its surroundings let expect it, (batch, *item)."""
        answer = torch.zeros_like(x)
        for which in range(4):
            mask = self.cells[which].expand(x.shape[0], -1, -1, -1)
            answer = answer + self.restore(x * (1 - mask), mask) * mask
        return answer

    def observe(self, x: Tensor, noise: Tensor, sigma: float, wants: list[str]) -> dict[str, Tensor]:
        """`x` and `y` alone: there is no latent vector."""
        del noise, sigma, wants
        return {"x": x.flatten(1), "y": self.reconstruct(x).flatten(1)}

    def corrupt(self, x: Tensor, corruption: Corruption, noise: Noise) -> Corrupted:
        """Defects made up, noise as everywhere, and one of the four sets of squares taken away."""
        corrupted = corrupt(self._with_defects(x, noise), corruption, noise)
        which = (4 * noise.uniform(len(x))).long().clamp_max(3)
        mask = self.cells[which]
        if corrupted.mask is not None:
            mask = torch.maximum(mask, corrupted.mask)
        return Corrupted(corrupted.x * (1 - mask), mask)

    def _with_defects(self, x: Tensor, noise: Noise) -> Tensor:
        """Some pictures with an ellipse, often as thin as a scratch, of another place's texture or another colour."""
        rows, channels, height, width = x.shape
        present, at_y, at_x, turn, length, thinness, kind, strength = noise.uniform(rows, 8)[:, :, None, None].unbind(1)
        tint = noise.normal(rows, channels)[:, :, None, None]
        side = min(height, width)
        long_ = 1 + length * self._config.defect_length_max * side
        short = (long_ * thinness.square()).clamp_min(0.7)
        y = torch.arange(height, device=x.device)[:, None] - at_y * height  # (rows, height, 1)
        x_ = torch.arange(width, device=x.device)[None, :] - at_x * width  # (rows, 1, width)
        angle = turn * math.pi
        along, across = x_ * angle.cos() + y * angle.sin(), y * angle.cos() - x_ * angle.sin()
        hit = ((along / long_).square() + (across / short).square() <= 1) & (present < self._config.defect_share)
        elsewhere = torch.roll(x, (height // 3, width // 2), (2, 3)).transpose(2, 3) if height == width else x.flip(3)
        deviation = x.flatten(1).std(1)[:, None, None, None]
        tinted = x + (0.5 + 3 * strength[:, None]) * deviation * (tint[:, :1].sign() + 0.3 * tint)
        defect = torch.where(kind[:, None] < 0.3, elsewhere, tinted).clamp(0.0, 1.0)
        return torch.where(hit[:, None], defect, x)


class _Residual(nn.Module):
    """x + conv(gelu(conv(gelu(x)))), without normalisation: every row is treated alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # close to the identity at first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.gelu(self.first(functional.gelu(x))))
