"""The convolutional autoencoder: strided convolutions around a dense code; as deep as the picture is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from training.autoencoders.autoencoder import Autoencoder
from training.autoencoders.layers import ConvDecoder, ConvEncoder, standardise_code
from training.errors import TrainingError


@dataclass(frozen=True)
class ConvolutionalConfig:
    """Widths of the stages (the last repeats for larger pictures) and where halving ends."""

    channels: tuple[PositiveInt, ...]
    latent_dim: PositiveInt
    smallest_side: PositiveInt = 7


class ConvolutionalAutoencoder(Autoencoder):
    """Convolutions with GroupNorm, a linear dense code, sigmoid output, mean squared error.

    Source: Masci et al. 2011, "Stacked convolutional auto-encoders", with strides for pooling.
    """

    config_type: ClassVar[type[Any]] = ConvolutionalConfig

    def __init__(self, item_shape: tuple[int, ...], config: ConvolutionalConfig) -> None:
        super().__init__()
        if len(item_shape) != 3:
            raise TrainingError(f"conv: expected pictures (channels, height, width), found items of {item_shape}")
        self.latent_dim = config.latent_dim
        shape = (item_shape[0], item_shape[1], item_shape[2])
        self.encoder = ConvEncoder(shape, config.channels, config.smallest_side, config.latent_dim)
        self.decoder = ConvDecoder(shape, config.channels, config.smallest_side, config.latent_dim)

    def encode(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, latent_dim)."""
        return self.encoder(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def standardise_latent(self, x: Tensor) -> None:
        """Mean 0 and standard deviation 1 per dimension."""
        standardise_code(self.encoder.code, self.decoder.code, self.encode(x))

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, *item), 0 to 1."""
        return torch.sigmoid(self.decoder(z))
