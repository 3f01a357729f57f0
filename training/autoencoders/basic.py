"""The basic autoencoder: fully connected layers around a narrow code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from training.autoencoders.autoencoder import Autoencoder
from training.autoencoders.layers import ActivationName, activation, mlp, unflatten


@dataclass(frozen=True)
class BasicConfig:
    """Sizes of a fully connected autoencoder; the decoder mirrors the encoder."""

    hidden_sizes: tuple[PositiveInt, ...]
    latent_dim: PositiveInt
    activation: ActivationName = "gelu"
    code_activation: bool = False  # the classic tutorial's; it lets latent units die


class BasicAutoencoder(Autoencoder):
    """Fully connected encoder and decoder, sigmoid output, mean squared error.

    Source: Hinton & Salakhutdinov 2006, Science 313, without the pre-training.
    """

    config_type: ClassVar[type[Any]] = BasicConfig

    def __init__(self, item_shape: tuple[int, ...], config: BasicConfig) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.item_shape: list[int] = list(item_shape)
        sizes = [math.prod(item_shape), *config.hidden_sizes, config.latent_dim]
        self.encoder = mlp(sizes, config.activation)
        if config.code_activation:
            self.encoder.append(activation(config.activation))
        self.decoder = mlp(sizes[::-1], config.activation)

    def encode(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, latent_dim)."""
        return self.encoder(x.flatten(1))  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, *item), 0 to 1."""
        return torch.sigmoid(unflatten(self.decoder(z), self.item_shape))
