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
    """Rescales a linear code to mean 0 and standard deviation at most 1, without changing what it decodes to.

    Latent vectors of one scale make distances fair and keep float32 rounding small.

    Args:
        last, first: the encoder's last and the decoder's first layer, with nothing between them.
        latents: what the encoder gives for training items, (items, latent_dim).
    """
    mean, std = latents.double().mean(0), latents.double().std(0)
    std = std.clamp_min(1.0)  # never blown up: rounding would be too, and a dead unit would show nothing else
    weight = first.weight.double()
    first.bias.copy_(first.bias.double() + weight @ mean)
    first.weight.copy_(weight * std)
    last.weight.copy_(last.weight.double() / std[:, None])
    last.bias.copy_((last.bias.double() - mean) / std)


class Crop(nn.Module):
    """Cuts pictures down to their first lines and columns."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height or more, width or more) → (batch, channels, height, width)."""
        return x[:, :, : self.height, : self.width]


def conv_stages(shape: tuple[int, int, int], channels: Sequence[int], smallest_side: int) -> list[tuple[int, int, int]]:
    """Shapes (channels, height, width) from the picture to the smallest map: at least one halving."""
    steps = max(1, len(conv_sides(min(shape[1:]), smallest_side)) - 1)
    stages = [shape]
    for i in range(steps):
        _, height, width = stages[-1]
        stages.append((channels[min(i, len(channels) - 1)], (height + 1) // 2, (width + 1) // 2))
    return stages


def norm_and_activation(channels: int) -> list[nn.Module]:
    """A normalisation of each row by itself, and an activation."""
    # GroupNorm, not BatchNorm: a row's answer must not depend on its neighbours.
    return [nn.GroupNorm(math.gcd(8, channels), channels), nn.GELU()]


def unflatten(flat: Tensor, sizes: list[int]) -> Tensor:
    """(batch, values) → (batch, *sizes)."""
    return torch.reshape(flat, [flat.shape[0]] + sizes)  # noqa: RUF005  # TorchScript knows no unpacking
