"""The variational autoencoder: a posterior over latent vectors, a standard normal prior to sample from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from app.artifacts.manifest import Capability
from training.autoencoders.autoencoder import Autoencoder, Figure
from training.autoencoders.layers import ActivationName, activation, mlp, unflatten
from training.losses import bernoulli_nll, kl_divergence, reparameterise

LOG_VAR_RANGE = (-12.0, 8.0)
"""Beyond it exp(log_var) is useless in float32, and one bad batch could end the training."""


@dataclass(frozen=True)
class VariationalConfig:
    """Sizes of a fully connected variational autoencoder; the decoder mirrors the encoder."""

    hidden_sizes: tuple[PositiveInt, ...]
    latent_dim: PositiveInt
    activation: ActivationName = "gelu"


class VariationalAutoencoder(Autoencoder):
    """Fully connected, diagonal Gaussian posterior, Bernoulli likelihood.

    Source: Kingma & Welling 2014, arXiv:1312.6114.
    """

    config_type: ClassVar[type[Any]] = VariationalConfig
    capabilities = (*Autoencoder.capabilities, Capability.SAMPLE)

    def __init__(self, item_shape: tuple[int, ...], config: VariationalConfig) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.item_shape: list[int] = list(item_shape)
        sizes = [math.prod(item_shape), *config.hidden_sizes]
        self.trunk = mlp(sizes, config.activation).append(activation(config.activation))
        self.mu = nn.Linear(sizes[-1], config.latent_dim)
        self.log_var = nn.Linear(sizes[-1], config.latent_dim)
        self.decoder = mlp([config.latent_dim, *sizes[::-1]], config.activation)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean, never a draw: (batch, *item) → (batch, latent_dim)."""
        return self.mu(self.trunk(x.flatten(1)))  # type: ignore[no-any-return]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` and clamped `log_var` of q(z|x), each (batch, latent_dim)."""
        h = self.trunk(x.flatten(1))
        return self.mu(h), self.log_var(h).clamp(*LOG_VAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """The pixels' expectations: (batch, latent_dim) → (batch, *item), 0 to 1."""
        return torch.sigmoid(self.logits(z))

    def logits(self, z: Tensor) -> Tensor:
        """`decode` before the sigmoid, (batch, *item)."""
        return unflatten(self.decoder(z), self.item_shape)

    def negative_elbo(self, x: Tensor, target: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """−ELBO as its two terms, reconstruction and KL, in nats: each (batch,), with one draw of the posterior."""
        mu, log_var = self.posterior(x)
        z = reparameterise(mu, log_var, noise)
        return bernoulli_nll(self.logits(z), target), kl_divergence(mu, log_var)

    def loss(self, x: Tensor, target: Tensor, noise: torch.Generator) -> Tensor:
        """−ELBO in nats, averaged over the batch."""
        nll, kl = self.negative_elbo(x, target, noise)
        return (nll + kl).mean()

    def figures(self, x: Tensor, noise: torch.Generator) -> dict[str, Figure]:
        """−ELBO and its KL term."""
        nll, kl = self.negative_elbo(x, x, noise)
        how = "grey levels taken as Bernoulli means: not comparable with likelihoods of binarised pictures"
        return {
            "negative_elbo": Figure(nll + kl, "nats per item", f"one posterior draw per item; {how}"),
            "kl_divergence": Figure(kl, "nats per item", "the part of negative_elbo that is the distance to the prior"),
        }
