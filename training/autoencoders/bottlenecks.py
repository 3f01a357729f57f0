"""What stands between encoder and decoder: from features to a latent vector and back, one class per kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from training.autoencoders.layers import activation, standardise_code, unflatten
from training.errors import TrainingError

CodeActivation = Literal["none", "relu", "gelu", "sigmoid"]


@dataclass(frozen=True)
class Pass:
    """One way through the bottleneck in training: what the decoder gets, and what that costs beside its error."""

    features: Tensor  # (batch, features)
    weight: float = 1.0  # of this pass's reconstruction error
    penalty: Tensor | None = None  # (batch,)


class Bottleneck(nn.Module):
    """Features to latent vectors and back. `encode` and `decode` are compiled for serving."""

    if TYPE_CHECKING:  # TorchScript would take the annotation for a type of its own
        latent_dim: int

    def encode(self, features: Tensor) -> Tensor:
        """(batch, features) → (batch, latent_dim)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, features)."""
        raise NotImplementedError

    def passes(self, features: Tensor, z: Tensor) -> list[Pass]:
        """The ways through, given the latent vectors: by default one, the served one."""
        del features
        return [Pass(self.decode(z))]

    def prepare(self, features: Callable[[], Tensor]) -> None:
        """Takes constants from the features of training items, before training; most take none, and do not ask."""

    def standardise(self, z: Tensor) -> None:
        """Scales the code, after training, where that changes no reconstruction."""


@dataclass(frozen=True)
class Dense:
    """A vector of `latent_dim` numbers; with an activation its units can die, without it is linear."""

    latent_dim: PositiveInt
    activation: CodeActivation = "none"

    def build(self, feature_shape: tuple[int, ...]) -> Bottleneck:
        """The module for features of this shape."""
        return _Dense(self, math.prod(feature_shape))


class _Dense(Bottleneck):
    def __init__(self, config: Dense, features: int) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.code = nn.Linear(features, config.latent_dim)
        self.activation: nn.Module = nn.Identity()
        if config.activation == "sigmoid":
            self.activation = nn.Sigmoid()
        elif config.activation != "none":
            self.activation = activation(config.activation)
        self.out = nn.Linear(config.latent_dim, features)

    def encode(self, features: Tensor) -> Tensor:
        return self.activation(self.code(features))

    def decode(self, z: Tensor) -> Tensor:
        return self.out(z)

    def standardise(self, z: Tensor) -> None:
        if isinstance(self.activation, nn.Identity):
            standardise_code(self.code, self.out, z)


@dataclass(frozen=True)
class Paired:
    """A linear vector of `latent_dim` numbers, and beside the network a narrow companion whose paths scores ask for.

    The companion's items have Gaussian noise of `companion_sigma`; both networks' items are shifted by up to `shift_px`
    pixels, and the wide one's have up to so many `rectangles`.
    """

    latent_dim: PositiveInt
    companion_sizes: tuple[PositiveInt, ...] = (512, 256)
    companion_latent_dim: PositiveInt = 32
    companion_sigma: NonNegativeFloat = 0.25
    shift_px: NonNegativeInt = 1
    rectangles: NonNegativeInt = 2

    def build(self, feature_shape: tuple[int, ...]) -> Bottleneck:
        """The wide network's module for features of this shape."""
        return Dense(self.latent_dim).build(feature_shape)


@dataclass(frozen=True)
class TopK:
    """A wide code of which each item keeps its `active` largest numbers.

    In training a second pass keeps each unit's largest numbers over the batch, this share of it (`lifetime`): all units
    are used alike, and none dies for never being among an item's largest.

    Source: Makhzani & Frey 2014, arXiv:1312.5663; the second pass: Makhzani & Frey 2015, arXiv:1409.2752.
    """

    latent_dim: PositiveInt
    active: PositiveInt
    lifetime: Annotated[float, Field(gt=0, le=1)] = 0.05

    def build(self, feature_shape: tuple[int, ...]) -> Bottleneck:
        """The module for features of this shape. Raises TrainingError if more are active than there are."""
        if self.active > self.latent_dim:
            raise TrainingError(
                f"bottleneck.active: expected at most latent_dim ({self.latent_dim}), found {self.active}"
            )
        return _TopK(self, math.prod(feature_shape))


class _TopK(Bottleneck):
    def __init__(self, config: TopK, features: int) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.active = config.active
        self.lifetime = config.lifetime
        self.code = nn.Linear(features, config.latent_dim)
        self.out = nn.Linear(config.latent_dim, features)
        with torch.no_grad():
            self.out.weight.copy_(functional.normalize(self.code.weight.T, dim=0))
            self.out.bias.zero_()

    def encode(self, features: Tensor) -> Tensor:
        return self.keep(self.rates(features), self.active, 1)

    def rates(self, features: Tensor) -> Tensor:
        """All units' rates, before all but the largest are put to zero."""
        return torch.relu(self.code(features - self.out.bias))

    def keep(self, rates: Tensor, count: int, dim: int) -> Tensor:
        """The rates with all but the largest at zero: so many of each item (1), or of each unit (0)."""
        values, indices = torch.topk(rates, count, dim=dim)
        return torch.zeros_like(rates).scatter(dim, indices, values)

    def decode(self, z: Tensor) -> Tensor:
        # Directions of length one: the penalty on many units cannot be dodged by small codes and large weights.
        return functional.linear(z, functional.normalize(self.out.weight, dim=0), self.out.bias)

    def passes(self, features: Tensor, z: Tensor) -> list[Pass]:
        shared = self.keep(self.rates(features), math.ceil(self.lifetime * len(features)), 0)
        sparse, even = self.decode(torch.cat([z, shared])).chunk(2)  # the directions are normalised once
        return [Pass(sparse), Pass(even)]

    @torch.no_grad()
    def prepare(self, features: Callable[[], Tensor]) -> None:
        self.out.bias.copy_(features().mean(0))


@dataclass(frozen=True)
class Memory:
    """A dense code replaced by a mixture of learnt prototypes: what resembles none of them cannot be rebuilt.

    Addressing weights below `shrinkage` / slots become zero; their entropy is penalised.

    Source: Gong et al. 2019, arXiv:1904.02639.
    """

    latent_dim: PositiveInt
    slots: PositiveInt = 500
    shrinkage: NonNegativeFloat = 1.0
    entropy: NonNegativeFloat = 2e-5

    def build(self, feature_shape: tuple[int, ...]) -> Bottleneck:
        """The module for features of this shape."""
        return _Memory(self, math.prod(feature_shape))


class _Memory(Bottleneck):
    def __init__(self, config: Memory, features: int) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.code = nn.Linear(features, config.latent_dim)
        self.slots = nn.Parameter(torch.randn(config.slots, config.latent_dim))
        self.sharpness = nn.Parameter(torch.tensor(2.0))  # log of the factor on the cosine
        self.out = nn.Linear(config.latent_dim, features)
        self.threshold = config.shrinkage / config.slots
        self.entropy = config.entropy

    def encode(self, features: Tensor) -> Tensor:
        return self.code(features)

    def address(self, z: Tensor) -> Tensor:
        """Shares of the slots, (batch, slots), summing to one."""
        cosine = functional.linear(functional.normalize(z, dim=1), functional.normalize(self.slots, dim=1))
        weights = torch.softmax(self.sharpness.exp() * cosine, dim=1)
        # The paper's hard shrinkage in its continuous form: zero below the threshold, unchanged far above it.
        over = weights - self.threshold
        weights = torch.relu(over) * weights / (over.abs() + 1e-12)
        return weights / weights.sum(1, keepdim=True).clamp_min(1e-12)

    def decode(self, z: Tensor) -> Tensor:
        return self.out(self.address(z) @ self.slots)

    def passes(self, features: Tensor, z: Tensor) -> list[Pass]:
        del features
        weights = self.address(z)
        entropy = -(weights * (weights + 1e-12).log()).sum(1)
        return [Pass(self.out(weights @ self.slots), penalty=self.entropy * entropy)]


@dataclass(frozen=True)
class Quantised:
    """A map of codebook entries: each place of the encoder's last map names one of `entries` vectors.

    The latent vector is that map before rounding, `channels` numbers a place; `decode` rounds it to the codebook.

    Source: van den Oord et al. 2017, arXiv:1711.00937, codebook by gradient, first taken from the data.
    """

    channels: PositiveInt = 8
    entries: PositiveInt = 256
    commitment: PositiveFloat = 0.25
    weight: PositiveFloat = 0.02  # of the codebook's terms beside the squared error per value

    def build(self, feature_shape: tuple[int, ...]) -> Bottleneck:
        """The module for a map of this shape. Raises TrainingError for features that are none."""
        if len(feature_shape) != 3:
            raise TrainingError("bottleneck: a codebook needs a map of features; choose a convolutional architecture")
        return _Quantised(self, feature_shape)


class _Quantised(Bottleneck):
    def __init__(self, config: Quantised, feature_shape: tuple[int, ...]) -> None:
        super().__init__()
        width, height, length = feature_shape
        self.map: list[int] = [width, height, length]
        self.latent: list[int] = [config.channels, height, length]
        self.latent_dim = math.prod(self.latent)
        self.code = nn.Conv2d(width, config.channels, 1)
        self.codebook = nn.Parameter(torch.randn(config.entries, config.channels))
        self.out = nn.Conv2d(config.channels, width, 1)
        self.commitment = config.commitment
        self.weight = config.weight

    def encode(self, features: Tensor) -> Tensor:
        return self.code(unflatten(features, self.map)).flatten(1)

    def places(self, z: Tensor) -> Tensor:
        """The vectors of a map, (batch · places, channels)."""
        return unflatten(z, self.latent).permute(0, 2, 3, 1).flatten(0, 2)

    def nearest(self, places: Tensor) -> Tensor:
        """Indices of the nearest entries, (batch · places,)."""
        # In the product's form: cdist changes its algorithm, hence its rounding, with the number of rows.
        distances = self.codebook.square().sum(1) - 2 * functional.linear(places, self.codebook)
        return distances.argmin(1)

    def quantise(self, z: Tensor) -> Tensor:
        """The map of the nearest entries, (batch, latent_dim)."""
        entries = self.codebook[self.nearest(self.places(z))]
        shape = [z.shape[0], self.latent[1], self.latent[2], self.latent[0]]
        return entries.reshape(shape).permute(0, 3, 1, 2).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        return self.out(unflatten(self.quantise(z), self.latent)).flatten(1)

    def passes(self, features: Tensor, z: Tensor) -> list[Pass]:
        del features
        z = z.float()
        rounded = self.quantise(z)
        towards_entries = (rounded.detach() - z).square().mean(1)
        towards_codes = (rounded - z.detach()).square().mean(1)
        straight = z + (rounded - z).detach()  # gradients pass the rounding by
        penalty = self.weight * (towards_codes + self.commitment * towards_entries)
        return [Pass(self.out(unflatten(straight, self.latent)).flatten(1), penalty=penalty)]

    @torch.no_grad()
    def prepare(self, features: Callable[[], Tensor]) -> None:
        places = self.places(self.encode(features()))
        step = max(1, len(places) // len(self.codebook))
        chosen = places[::step][: len(self.codebook)]
        self.codebook[: len(chosen)] = chosen


@dataclass(frozen=True)
class Gaussian:
    """A posterior N(mu, sigma²) per latent number, against the prior N(0, 1).

    `beta` weighs the KL term, `free_bits` (nats a dimension) are not charged, `importance_samples` above 1 tighten the
    bound, and the KL term grows from nothing over the first `warmup_fraction` of the training.

    Source: Kingma & Welling 2014, arXiv:1312.6114; beta: Higgins et al. 2017; importance samples: Burda et al. 2016,
    arXiv:1509.00519.
    """

    latent_dim: PositiveInt
    beta: PositiveFloat = 1.0
    free_bits: NonNegativeFloat = 0.0
    importance_samples: PositiveInt = 1
    warmup_fraction: NonNegativeFloat = 0.0

    def build(self, feature_shape: tuple[int, ...]) -> Bottleneck:
        """The module for features of this shape. Raises TrainingError for settings that exclude each other."""
        if self.importance_samples > 1 and (self.beta != 1 or self.free_bits):
            raise TrainingError("bottleneck: importance_samples above 1 know neither beta nor free_bits")
        return GaussianBottleneck(self, math.prod(feature_shape))


LOG_VAR_RANGE = (-12.0, 8.0)
"""Beyond it exp(log_var) is useless in float32, and one bad batch could end the training."""


class GaussianBottleneck(Bottleneck):
    """Two heads, mean and log-variance; what it encodes to is the mean."""

    def __init__(self, config: Gaussian, features: int) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.mu = nn.Linear(features, config.latent_dim)
        self.log_var = nn.Linear(features, config.latent_dim)
        self.lowest, self.highest = LOG_VAR_RANGE
        self.out = nn.Linear(config.latent_dim, features)

    def encode(self, features: Tensor) -> Tensor:
        """The posterior's mean, never a draw: (batch, features) → (batch, latent_dim)."""
        return self.mu(features)

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` and clamped `log_var` of q(z|x), each (batch, latent_dim), in float32."""
        mu: Tensor = self.mu(features)
        return mu.float(), self.log_var(features).float().clamp(self.lowest, self.highest)

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_dim) → (batch, features)."""
        return self.out(z)


@dataclass(frozen=True)
class NoBottleneck:
    """None: the item's details reach the output past any code."""


@dataclass(frozen=True)
class Surroundings:
    """None: what an item should look like is told from its surroundings, square by square.

    The picture is covered by squares of `cell_px` in four sets; each set is taken away in turn, and filled in from what
    is left. In training half of the pictures have a defect made up, which is not to be restored.

    Source: RIAD, Zavrtanik et al. 2021, doi:10.1016/j.patcog.2020.107706; made-up defects: DRAEM, the same 2021,
    arXiv:2108.07610; CutPaste, Li et al. 2021, arXiv:2104.04015.
    """

    cell_px: PositiveInt = 8
    defect_share: NonNegativeFloat = 0.5
    defect_length_max: PositiveFloat = 0.25  # half of it, of the picture's shorter side


BottleneckConfig = Dense | Paired | TopK | Memory | Quantised | Gaussian | NoBottleneck | Surroundings
