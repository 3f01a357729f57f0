"""The stacks of layers that autoencoders are made of; each works on any item shape and treats every row alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

ActivationName = Literal["relu", "gelu"]


def activation(name: ActivationName) -> nn.Module:
    """A new activation layer."""
    return nn.ReLU() if name == "relu" else nn.GELU()


def mlp(sizes: Sequence[int], activation_name: ActivationName) -> nn.Sequential:
    """Linear layers of these sizes with activations between them, none after the last."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        if i:
            layers.append(activation(activation_name))
        layers.append(nn.Linear(fan_in, fan_out))
    return nn.Sequential(*layers)


def conv_sides(side: int, smallest_side: int) -> list[int]:
    """The side lengths that a picture passes through when halved, rounding up, until at most `smallest_side`."""
    sides = [side]
    while sides[-1] > smallest_side:
        sides.append((sides[-1] + 1) // 2)
    return sides


@torch.no_grad()
def standardise_code(last: nn.Linear, first: nn.Linear, latents: Tensor) -> None:
    """Rescales a linear code to mean 0 and standard deviation 1 per dimension, without changing what it decodes to.

    Latent vectors of one scale make distances fair and keep float32 rounding small.

    Args:
        last, first: the encoder's last and the decoder's first layer, with nothing between them.
        latents: what the encoder gives for training items, (items, latent_dim).
    """
    mean, std = latents.double().mean(0), latents.double().std(0)
    std = std.clamp_min(0.1)  # a dead unit stays one: blown up, it would show rounding only
    weight = first.weight.double()
    first.bias.copy_(first.bias.double() + weight @ mean)
    first.weight.copy_(weight * std)
    last.weight.copy_(last.weight.double() / std[:, None])
    last.bias.copy_((last.bias.double() - mean) / std)


class ConvEncoder(nn.Module):
    """Halves a picture until its shorter side is at most `smallest_side`, then maps it to `outputs` numbers.

    `channels` are the widths of the stages; the last one repeats if the picture needs more of them.
    """

    def __init__(self, shape: tuple[int, int, int], channels: Sequence[int], smallest_side: int, outputs: int) -> None:
        super().__init__()
        stages = conv_stages(shape, channels, smallest_side)
        layers: list[nn.Module] = []
        for (fan_in, _, _), (fan_out, _, _) in itertools.pairwise(stages):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), *_norm_and_activation(fan_out)]
        self.stages = nn.Sequential(*layers)
        self.code = nn.Linear(math.prod(stages[-1]), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, outputs)."""
        return self.code(self.stages(x).flatten(1))  # type: ignore[no-any-return]


class ConvDecoder(nn.Module):
    """The way back of `ConvEncoder`: from latent vectors to the logits of a picture."""

    def __init__(
        self, shape: tuple[int, int, int], channels: Sequence[int], smallest_side: int, latent_dim: int
    ) -> None:
        super().__init__()
        stages = conv_stages(shape, channels, smallest_side)[::-1]
        self.first: list[int] = list(stages[0])
        self.code = nn.Linear(latent_dim, math.prod(stages[0]))
        layers: list[nn.Module] = [nn.GELU()]
        for i, ((fan_in, _, _), (fan_out, height, width)) in enumerate(itertools.pairwise(stages)):
            # Doubles the sides; a side that was odd before it was halved loses the surplus line again.
            layers += [nn.ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=1), _Crop(height, width)]
            if i < len(stages) - 2:
                layers += _norm_and_activation(fan_out)
        self.stages = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → logits (batch, channels, height, width)."""
        return self.stages(unflatten(self.code(z), self.first))  # type: ignore[no-any-return]


class _Crop(nn.Module):
    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : self.height, : self.width]


def conv_stages(shape: tuple[int, int, int], channels: Sequence[int], smallest_side: int) -> list[tuple[int, int, int]]:
    """Shapes (channels, height, width) from the picture to the smallest map: at least one halving."""
    steps = max(1, len(conv_sides(min(shape[1:]), smallest_side)) - 1)
    stages = [shape]
    for i in range(steps):
        _, height, width = stages[-1]
        stages.append((channels[min(i, len(channels) - 1)], (height + 1) // 2, (width + 1) // 2))
    return stages


def _norm_and_activation(channels: int) -> list[nn.Module]:
    # GroupNorm, not BatchNorm: a row's answer must not depend on its neighbours.
    return [nn.GroupNorm(math.gcd(8, channels), channels), nn.GELU()]


def unflatten(flat: Tensor, sizes: list[int]) -> Tensor:
    """(batch, values) → (batch, *sizes)."""
    return torch.reshape(flat, [flat.shape[0]] + sizes)  # noqa: RUF005  # TorchScript knows no unpacking
