"""Two autoencoders for one score: a wide one that undoes much noise, and a narrow one whose paths say the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from training.autoencoders.autoencoder import pooled
from training.autoencoders.bottlenecks import Dense, Paired
from training.autoencoders.hourglass import Blocks, Hourglass
from training.autoencoders.mlp import Mlp
from training.errors import TrainingError
from training.noise import Noise

RECTANGLE_SIDE_MAX = 0.5  # of the picture's


class PairedHourglass(Hourglass):
    """An hourglass with a narrow companion that is trained beside it on the same items; only scores ask the companion.

    In training items are shifted a little, which says that a shifted item is a normal one, and what the wide network
    sees besides has rectangles pasted over it.
    """

    if TYPE_CHECKING:
        companion: Hourglass

    __jit_ignored_attributes__: ClassVar[list[str]] = [*Hourglass.__jit_ignored_attributes__, "_config"]

    def __init__(self, item_shape: tuple[int, ...], blocks: Blocks) -> None:
        super().__init__(item_shape, blocks)
        config = blocks.bottleneck
        if not isinstance(config, Paired):
            raise TrainingError("bottleneck: expected one with a companion")
        self._config = config
        narrow = Blocks(
            Mlp(config.companion_sizes), Dense(config.companion_latent_dim), blocks.likelihood, blocks.regulariser
        )
        self.companion = Hourglass(item_shape, narrow)

    def companion_path(self, x: Tensor) -> Tensor:
        """`path` of `observe`, as the companion goes it."""
        companion = self.companion
        y = companion.reconstruct(x)
        residual = pooled(companion.standardise(y) - companion.standardise(x), 32).flatten(1)
        return torch.cat([residual, companion.trace(y) - companion.trace(x)], dim=1)

    @torch.no_grad()
    def prepare(self, items: Tensor) -> None:
        """Constants of both."""
        super().prepare(items)
        self.companion.prepare(items)

    @torch.no_grad()
    def standardise_latent(self, x: Tensor) -> None:
        """The codes of both."""
        super().standardise_latent(x)
        self.companion.standardise_latent(x)

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, noise: Noise) -> Tensor:
        """The sum of both losses: as if each were trained alone, in the same order of items."""
        config = self._config
        if self.training and config.shift_px and not self.records:
            choice = noise.uniform(len(x))
            x, target = (shifted(items, choice, config.shift_px) for items in (x, target))
        sigma = config.companion_sigma * noise.normal(*target.shape)
        for_companion = self.companion.add_noise(target, sigma)
        if not self.records:
            for _ in range(config.rectangles):
                x = _with_rectangle(x, noise)
        of_companion = self.companion.loss(for_companion, None, target, noise)
        return super().loss(x, mask, target, noise) + of_companion


def shifted(x: Tensor, choice: Tensor, most_px: int) -> Tensor:
    """Pictures, each moved by up to so many pixels down or up and right or left, as `choice` in [0, 1) decides."""
    side = 2 * most_px + 1
    which = (choice * side * side).long()
    out = x.clone()
    for index in range(side * side):
        rows = which == index
        down, right = index // side - most_px, index % side - most_px
        if down or right:
            out[rows] = torch.roll(x[rows], (down, right), (2, 3))
    return out


def _with_rectangle(x: Tensor, noise: Noise) -> Tensor:
    """Half of the pictures get a rectangle of one grey somewhere, black as often as not."""
    rows, _, height, width = x.shape
    present, grey, *places = noise.uniform(rows, 6).unbind(1)
    inside = []
    for axis, side in enumerate((height, width)):
        extent = (places[axis] * RECTANGLE_SIDE_MAX * side).ceil()[:, None]
        first = (places[2 + axis][:, None] * (side - extent + 1)).floor()
        position = torch.arange(side, device=x.device)
        inside.append((position >= first) & (position < first + extent))
    hit = inside[0][:, None, :, None] & inside[1][:, None, None, :] & (present < 0.5)[:, None, None, None]
    value = (2 * grey - 1).clamp_min(0.0)[:, None, None, None]
    return torch.where(hit, value, x)
