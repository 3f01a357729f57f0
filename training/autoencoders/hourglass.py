"""Encoder, bottleneck, decoder: the autoencoder put together from blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from training.autoencoders.autoencoder import Autoencoder, Figure, Kind, kind_of, pooled
from training.autoencoders.bottlenecks import BottleneckConfig, Gaussian, GaussianBottleneck, NoBottleneck, Surroundings
from training.autoencoders.convolution import Convolution
from training.autoencoders.mlp import Mlp
from training.autoencoders.unet import UNet
from training.corruptions import Corrupted, Corruption, corrupt
from training.errors import TrainingError
from training.losses import bernoulli_nll, kl_divergence_by_dimension, mean_squared_error, normal_log_density
from training.noise import Noise

ArchitectureConfig = Mlp | Convolution | UNet


@dataclass(frozen=True)
class Likelihood:
    """How far an answer is from its target.

    `mse`: squared error, mean over the values. `bernoulli`: −log-likelihood of independent bits, in nats, summed over
    the values; for records, whose values are no bits, it is `gaussian`: the same of normal values with one learnt
    standard deviation.
    """

    kind: Literal["mse", "bernoulli", "gaussian"] = "mse"
    output: Literal["sigmoid", "linear"] = "sigmoid"  # of pictures; served answers are clipped to 0…1 either way
    binarise: bool = False  # bits are drawn anew from the grey levels at every step


@dataclass(frozen=True)
class Regulariser:
    """What is asked of the latent vector beside reconstruction; each weight adds to the loss, zero does not.

    `l1`: mean absolute value. `kl_sparsity`: KL divergence of each unit's mean rate in the batch from `kl_target`, for
    a code behind a sigmoid. `contraction`: squared Frobenius norm of the encoder's Jacobian, by one random projection.

    Source: Ng 2011, CS294A notes; Rifai et al. 2011, ICML, "Contractive auto-encoders".
    """

    l1: NonNegativeFloat = 0.0
    kl_sparsity: NonNegativeFloat = 0.0
    kl_target: NonNegativeFloat = 0.05
    contraction: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Blocks:
    """All that a network is made of."""

    architecture: ArchitectureConfig
    bottleneck: BottleneckConfig
    likelihood: Likelihood
    regulariser: Regulariser


class Standardise(nn.Module):
    """Features to mean 0 and standard deviation 1, and back, by constants of the training data."""

    if TYPE_CHECKING:  # TorchScript would take annotations for types of its own
        mean: Tensor
        scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def fit(self, items: Tensor) -> None:
        """Takes the constants from items; a feature that never changes keeps its scale."""
        std = items.double().std(0, correction=0)
        self.mean.copy_(items.double().mean(0))
        self.scale.copy_(torch.where(std > 0, std, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) in the data's units → standardised."""
        return (x - self.mean) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """(batch, features) standardised → in the data's units."""
        return x * self.scale + self.mean


class Unscaled(nn.Module):
    """Leaves pictures as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def inverse(self, x: Tensor) -> Tensor:
        """Answers within the range of pictures."""
        return x.clamp(0.0, 1.0)


class Hourglass(Autoencoder):
    """An encoder to features, a bottleneck, and the way back."""

    def __init__(self, item_shape: tuple[int, ...], blocks: Blocks) -> None:
        super().__init__()
        if isinstance(blocks.architecture, UNet) or isinstance(blocks.bottleneck, (NoBottleneck, Surroundings)):
            raise TrainingError("bottleneck: expected one, found none")
        kind = kind_of(item_shape)
        refuse_other_kinds(blocks.architecture.takes, kind)
        feature_shape = blocks.architecture.feature_shape(item_shape)
        self.records = kind == "records"
        self.scaling: Standardise | Unscaled = Standardise(math.prod(item_shape)) if self.records else Unscaled()
        self.encoder = blocks.architecture.encoder(item_shape)
        self.traced = [i for i, layer in enumerate(self.encoder) if isinstance(layer, (nn.ReLU, nn.GELU))] or [-1]
        self.bottleneck = blocks.bottleneck.build(feature_shape)
        self.decoder = blocks.architecture.decoder(item_shape)
        self.latent_dim = self.bottleneck.latent_dim
        likelihood = blocks.likelihood
        self.sigmoid = likelihood.output == "sigmoid" and not self.records
        self.likelihood: str = likelihood.kind
        if self.records and likelihood.kind == "bernoulli":
            self.likelihood = "gaussian"
        self.binarise = likelihood.binarise and not self.records
        if self.likelihood == "gaussian":
            self.log_sigma = nn.Parameter(torch.zeros(()))
        self._regulariser = blocks.regulariser
        if blocks.regulariser.kl_sparsity and getattr(blocks.bottleneck, "activation", "") != "sigmoid":
            raise TrainingError("regulariser.kl_sparsity: needs bottleneck.activation=sigmoid, whose rates are 0 to 1")

    __jit_ignored_attributes__: ClassVar[list[str]] = [*Autoencoder.__jit_ignored_attributes__, "_regulariser"]

    def encode(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, latent_dim)."""
        return self.bottleneck.encode(self.encoder(self.scaling(x)))

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, *item)."""
        return self.scaling.inverse(self.activate(self.decoder(self.bottleneck.decode(z))))

    def activate(self, logits: Tensor) -> Tensor:
        """The decoder's output as standardised items."""
        return torch.sigmoid(logits) if self.sigmoid else logits

    def blank(self, x: Tensor, mask: Tensor) -> Tensor:
        """What is missing is zero in a picture, the feature's mean in a record."""
        blanked: Tensor = self.scaling.inverse(self.scaling(x) * (1 - mask))
        return blanked

    def standardise(self, x: Tensor) -> Tensor:
        """Records in units of each feature's deviation, pictures as they are."""
        return self.scaling(x)

    def trace(self, x: Tensor) -> Tensor:
        """The hidden layers' answers, maps shrunk to 4 × 4, and the latent vector."""
        h: Tensor = self.scaling(x)
        steps: list[Tensor] = []
        for index, layer in enumerate(self.encoder):
            h = layer(h)
            if index in self.traced:
                steps.append(pooled(h, 4).flatten(1))
        steps.append(self.bottleneck.encode(h))
        return torch.cat(steps, dim=1)

    def add_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """X with noise in units of each feature's deviation; pictures are clipped."""
        noisy: Tensor = self.scaling.inverse(self.scaling(x) + noise)
        return noisy

    @torch.no_grad()
    def prepare(self, items: Tensor) -> None:
        """Standardisation, and the bottleneck's constants."""
        if isinstance(self.scaling, Standardise):
            self.scaling.fit(items)
        self.bottleneck.prepare(lambda: self.encoder(self.scaling(items)))

    def corrupt(self, x: Tensor, corruption: Corruption, noise: Noise) -> Corrupted:
        """Noise in units of the standardised item."""
        if not self.records:
            return corrupt(x, corruption, noise)
        corrupted = corrupt(self.scaling(x), corruption, noise, limits=None)
        return Corrupted(self.scaling.inverse(corrupted.x), corrupted.mask)

    def error(self, logits: Tensor, target: Tensor) -> Tensor:
        """The likelihood's part of the loss for standardised targets, (batch,)."""
        logits = logits.float()
        if self.likelihood == "bernoulli":
            return bernoulli_nll(logits, target)
        if self.likelihood == "gaussian":
            return -normal_log_density(target, self.activate(logits), self.log_sigma)
        return mean_squared_error(self.activate(logits), target)

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, noise: Noise) -> Tensor:
        """Reconstruction error and regularisers, averaged over the batch."""
        del mask
        x, target = self.scaling(x), self.scaling(target)
        features = self.encoder(x)
        z = self.bottleneck.encode(features)
        total = torch.zeros(len(x), device=x.device)
        for way in self.bottleneck.passes(features, z):
            total = total + way.weight * self.error(self.decoder(way.features), target)
            if way.penalty is not None:
                total = total + way.penalty
        return total.mean() + self._regularise(x, z, noise)

    def _regularise(self, x: Tensor, z: Tensor, noise: Noise) -> Tensor:
        regulariser, total = self._regulariser, torch.zeros((), device=x.device)
        if regulariser.l1:
            total = total + regulariser.l1 * z.abs().mean()
        if regulariser.kl_sparsity:
            rate, aim = z.float().mean(0).clamp(1e-4, 1 - 1e-4), regulariser.kl_target
            divergence = aim * (aim / rate).log() + (1 - aim) * ((1 - aim) / (1 - rate)).log()
            total = total + regulariser.kl_sparsity * divergence.mean()
        if regulariser.contraction:
            total = total + regulariser.contraction * self._contraction(x, noise)
        return total

    def _contraction(self, x: Tensor, noise: Noise) -> Tensor:
        """E‖∂z/∂x‖² over the batch: ‖Jᵀv‖² of a standard normal v has it as expectation."""
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = self.bottleneck.encode(self.encoder(x))
            direction = noise.normal(*z.shape)
            (slope,) = torch.autograd.grad((z * direction).sum(), x, create_graph=training)
        return slope.float().square().flatten(1).sum(1).mean()

    @torch.no_grad()
    def standardise_latent(self, x: Tensor) -> None:
        """Mean 0 and standard deviation at most 1 per dimension where the code is linear."""
        self.bottleneck.standardise(self.encode(x))


class VariationalHourglass(Hourglass):
    """With a posterior over latent vectors, and a standard normal prior to sample from.

    Source: Kingma & Welling 2014, arXiv:1312.6114.
    """

    prior: ClassVar[bool] = True
    if TYPE_CHECKING:
        bottleneck: GaussianBottleneck

    def __init__(self, item_shape: tuple[int, ...], blocks: Blocks) -> None:
        super().__init__(item_shape, blocks)
        if not isinstance(blocks.bottleneck, Gaussian):
            raise TrainingError(f"bottleneck: expected a gaussian one, found {blocks.bottleneck}")
        self._config = blocks.bottleneck
        self._kl_weight = 1.0
        if self.likelihood == "mse":
            raise TrainingError("likelihood.kind: a variational autoencoder needs bernoulli or gaussian, found mse")

    __jit_ignored_attributes__: ClassVar[list[str]] = [
        *Hourglass.__jit_ignored_attributes__,
        "_config",
        "_kl_weight",
    ]

    def advance(self, fraction: float) -> None:
        """So much of the training is done: the KL term's weight follows."""
        warmup = self._config.warmup_fraction
        self._kl_weight = min(1.0, fraction / warmup) if warmup else 1.0

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` and `log_var` of q(z|x) for standardised items, each (batch, latent_dim)."""
        return self.bottleneck.posterior(self.encoder(x))

    def logits(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → the decoder's output, (batch, *item)."""
        return self.decoder(self.bottleneck.decode(z))

    def log_weights(self, x: Tensor, target: Tensor, draws: int, noise: Noise) -> Tensor:
        """Log p(x, z) − log q(z|x) of draws from the posterior, (batch, draws): the importance weights."""
        mu, log_var = self.posterior(x)
        eps = noise.normal(len(x), draws, mu.shape[1])  # (batch, draws, latent_dim)
        z = mu[:, None] + (0.5 * log_var)[:, None].exp() * eps
        of_target = target[:, None].expand(-1, draws, *target.shape[1:]).flatten(0, 1)
        log_likelihood = -self.error(self.logits(z.flatten(0, 1)), of_target).view(len(x), draws)
        # The 2π of prior and posterior cancel.
        log_ratio = 0.5 * (eps.square() + log_var[:, None] - z.square()).sum(2)
        return log_likelihood + log_ratio

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, noise: Noise) -> Tensor:
        """−ELBO, or the importance-weighted bound, in nats, averaged over the batch."""
        del mask
        config = self._config
        x, target = self.scaling(x), self.scaling(target)
        if self.binarise:
            target = (noise.uniform(*target.shape) < target).to(target.dtype)
            x = target
        if config.importance_samples > 1:
            weights = self.log_weights(x, target, config.importance_samples, noise)
            return (math.log(weights.shape[1]) - weights.logsumexp(1)).mean()
        mu, log_var = self.posterior(x)
        z = mu + (0.5 * log_var).exp() * noise.normal(*mu.shape)
        kl = kl_divergence_by_dimension(mu, log_var)  # (batch, latent_dim)
        if config.free_bits:
            kl = kl.mean(0, keepdim=True).clamp_min(config.free_bits)
        weight = self._kl_weight * config.beta
        return self.error(self.logits(z), target).mean() + weight * kl.sum(1).mean()

    def nats(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Both parts of −ELBO at the posterior's mean; of normal values up to a factor and a constant."""
        if self.likelihood == "bernoulli":
            sure = y.clamp(1e-3, 1 - 1e-3)  # rounding near 0 and 1 would be blown up by the logarithm
            likelihood = -(x * sure.log() + (1 - x) * (1 - sure).log()).flatten(1).sum(1)
        else:
            likelihood = 0.5 * (y - x).square().flatten(1).sum(1)
        mu, log_var = self.posterior(x)
        # In double: of a posterior close to the prior it is the difference of nearly equal numbers.
        divergence = kl_divergence_by_dimension(mu.double(), log_var.double()).sum(1).float()
        return {"likelihood": likelihood, "divergence": divergence}

    def latent_draws(self, x: Tensor, noise: Noise) -> Tensor:
        """A draw of each item's posterior: together they are the aggregate posterior."""
        mu, log_var = self.posterior(self.scaling(x))
        return mu + (0.5 * log_var).exp() * noise.normal(*mu.shape)

    def figures(self, x: Tensor, noise: Noise) -> dict[str, Figure]:
        """−ELBO and its KL term."""
        x = self.scaling(x)
        mu, log_var = self.posterior(x)
        z = mu + (0.5 * log_var).exp() * noise.normal(*mu.shape)
        kl = kl_divergence_by_dimension(mu, log_var).sum(1)
        how = (
            "normal values of one learnt deviation, standardised"
            if self.likelihood == "gaussian"
            else "grey levels taken as Bernoulli means: not comparable with likelihoods of binarised pictures"
        )
        return {
            "negative_elbo": Figure(
                self.error(self.logits(z), x) + kl, "nats per item", f"one posterior draw per item; {how}"
            ),
            "kl_divergence": Figure(kl, "nats per item", "the part of negative_elbo that is the distance to the prior"),
        }


def refuse_other_kinds(takes: tuple[Kind, ...], kind: Kind) -> None:
    """Raises TrainingError if an architecture does not take items of this kind."""
    if kind not in takes:
        raise TrainingError(f"architecture: takes {' and '.join(takes)}, found {kind}")
