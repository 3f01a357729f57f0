"""The basic autoencoder: fully connected layers around a narrow code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from training.autoencoders.autoencoder import Autoencoder
from training.autoencoders.layers import ActivationName, activation, mlp, standardise_code, unflatten


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
        self.code_is_linear = not config.code_activation
        self.encoder = mlp(sizes, config.activation)
        if config.code_activation:
            self.encoder.append(activation(config.activation))
        self.decoder = mlp(sizes[::-1], config.activation)

    def encode(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, latent_dim)."""
        return self.encoder(x.flatten(1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def standardise_latent(self, x: Tensor) -> None:
        """Mean 0 and standard deviation 1 per dimension; a code behind an activation stays as it is."""
        if self.code_is_linear:
            last, first = cast("nn.Linear", self.encoder[-1]), cast("nn.Linear", self.decoder[0])
            standardise_code(last, first, self.encode(x))

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, *item), 0 to 1."""
        return torch.sigmoid(unflatten(self.decoder(z), self.item_shape))
