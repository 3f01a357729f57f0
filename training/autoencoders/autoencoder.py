"""What the rest of the package relies on in every autoencoder; knows no architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from app.artifacts.manifest import Capability
from training.losses import mean_squared_error


@dataclass(frozen=True)
class Figure:
    """A quality figure that only one family has: a value per item, and how to read it."""

    values: Tensor  # (batch,)
    unit: str
    protocol: str


class Autoencoder(nn.Module):
    """A network with a latent vector in its middle.

    A subclass is built as `Network(item_shape, config)` with a frozen dataclass of the type `config_type`. Its
    `encode` and `decode` are compiled for serving: plain tensor code, no random numbers, and nothing whose value for
    one row depends on another row. `loss` and `figures` stay behind in training.
    """

    config_type: ClassVar[type[Any]]
    capabilities: ClassVar[tuple[Capability, ...]] = (
        Capability.ENCODE,
        Capability.DECODE,
        Capability.RECONSTRUCT,
        Capability.ANOMALY_SCORE,
    )
    latent_dim: int

    def encode(self, x: Tensor) -> Tensor:
        """The latent vectors of x, (batch, *item) → (batch, latent_dim)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The items that latent vectors stand for, (batch, latent_dim) → (batch, *item)."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor:
        """What is left of x after its way through the latent vector, (batch, *item)."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, target: Tensor, noise: torch.Generator) -> Tensor:
        """The scalar to minimise: by default the mean squared error.

        Args:
            x: what the network sees, (batch, *item), perhaps corrupted.
            target: what it should answer, (batch, *item).
            noise: where a stochastic network draws from.
        """
        del noise
        return mean_squared_error(self.reconstruct(x), target).mean()

    def standardise_latent(self, x: Tensor) -> None:
        """Called once after training with training items: scales the code where that is possible exactly."""
        del x

    def figures(self, x: Tensor, noise: torch.Generator) -> dict[str, Figure]:
        """Quality figures of this family alone, by name; by default none."""
        del x, noise
        return {}
