"""The fully connected architecture: for records, and for pictures taken as vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor, nn

from training.autoencoders.autoencoder import Kind
from training.autoencoders.layers import ActivationName, activation, mlp, unflatten


@dataclass(frozen=True)
class Mlp:
    """Widths of the encoder's hidden layers; the decoder mirrors them. Without any, the code is all there is."""

    hidden_sizes: tuple[PositiveInt, ...] = ()
    activation: ActivationName = "gelu"

    takes: ClassVar[tuple[Kind, ...]] = ("pictures", "records")

    def feature_shape(self, item_shape: tuple[int, ...]) -> tuple[int, ...]:
        """What the encoder hands to the bottleneck."""
        return (self.hidden_sizes[-1] if self.hidden_sizes else math.prod(item_shape),)

    def encoder(self, item_shape: tuple[int, ...]) -> nn.Sequential:
        """(batch, *item) → (batch, features)."""
        layers = mlp([math.prod(item_shape), *self.hidden_sizes], self.activation)
        if self.hidden_sizes:
            layers.append(activation(self.activation))
        return nn.Sequential(nn.Flatten(1), *layers)

    def decoder(self, item_shape: tuple[int, ...]) -> nn.Module:
        """(batch, features) → logits (batch, *item)."""
        layers = mlp([math.prod(item_shape), *self.hidden_sizes][::-1], self.activation)
        first = [activation(self.activation)] if self.hidden_sizes else []
        return nn.Sequential(*first, *layers, _Unflatten(list(item_shape)))


class _Unflatten(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return unflatten(x, self.sizes)
