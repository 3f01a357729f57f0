"""The convolutional architecture: for pictures of any size, as deep as the picture is large."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor, nn

from training.autoencoders.autoencoder import Kind
from training.autoencoders.layers import Crop, conv_stages, norm_and_activation, unflatten


@dataclass(frozen=True)
class Convolution:
    """Widths of the stages (the last repeats for larger pictures) and where halving ends.

    Convolutions of stride 2 with GroupNorm; the decoder mirrors them.

    Source: Masci et al. 2011, "Stacked convolutional auto-encoders", with strides for pooling.
    """

    channels: tuple[PositiveInt, ...]
    smallest_side: PositiveInt = 7

    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)

    def feature_shape(self, item_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(channels, height, width) of the smallest map."""
        return self._stages(item_shape)[-1]

    def encoder(self, item_shape: tuple[int, ...]) -> nn.Sequential:
        """(batch, *item) → (batch, features)."""
        layers: list[nn.Module] = []
        for (fan_in, _, _), (fan_out, _, _) in itertools.pairwise(self._stages(item_shape)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), *norm_and_activation(fan_out)]
        return nn.Sequential(*layers, nn.Flatten(1))

    def decoder(self, item_shape: tuple[int, ...]) -> nn.Module:
        """(batch, features) → logits (batch, *item)."""
        stages = self._stages(item_shape)[::-1]
        layers: list[nn.Module] = [nn.GELU()]
        for i, ((fan_in, _, _), (fan_out, height, width)) in enumerate(itertools.pairwise(stages)):
            # Doubles the sides; a side that was odd before it was halved loses the surplus line again.
            layers += [nn.ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=1), Crop(height, width)]
            if i < len(stages) - 2:
                layers += norm_and_activation(fan_out)
        return _Decoder(list(stages[0]), nn.Sequential(*layers))

    def _stages(self, item_shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        channels, height, width = item_shape
        return conv_stages((channels, height, width), self.channels, self.smallest_side)


class _Decoder(nn.Module):
    def __init__(self, first: list[int], stages: nn.Sequential) -> None:
        super().__init__()
        self.first = first
        self.stages = stages

    def forward(self, features: Tensor) -> Tensor:
        return self.stages(unflatten(features, self.first))
