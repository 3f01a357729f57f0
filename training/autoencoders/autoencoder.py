"""What the rest of the package relies on in every autoencoder; knows no architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.artifacts.manifest import Capability
from training.corruptions import Corrupted, Corruption, corrupt
from training.losses import mean_squared_error
from training.noise import Noise

Kind = Literal["pictures", "records"]


def kind_of(item_shape: tuple[int, ...]) -> Kind:
    """Pictures are (channels, height, width), records (features,)."""
    return "pictures" if len(item_shape) == 3 else "records"


@dataclass(frozen=True)
class Figure:
    """A quality figure that only one family has: a value per item, and how to read it."""

    values: Tensor  # (batch,)
    unit: str
    protocol: str


class Autoencoder(nn.Module):
    """A network that answers items for items, most with a latent vector in the middle.

    What is compiled for serving (`encode`, `decode`, `reconstruct`, `restore`, `blank`, `observe`, what they call) is
    plain tensor code: no random numbers, and nothing whose value for one row depends on another row. The rest stays
    behind in training.
    """

    __jit_ignored_attributes__: ClassVar[list[str]] = ["capabilities", "prior"]

    capabilities: tuple[Capability, ...] = (
        Capability.ENCODE,
        Capability.DECODE,
        Capability.RECONSTRUCT,
        Capability.ANOMALY_SCORE,
        Capability.ANOMALY_MAP,
        Capability.SAMPLE,
    )
    prior: ClassVar[bool] = False  # latent vectors are trained towards N(0, I)
    if TYPE_CHECKING:  # TorchScript would take the annotation for a type of its own
        latent_dim: int | None

    def encode(self, x: Tensor) -> Tensor:
        """The latent vectors of x, (batch, *item) → (batch, latent_dim)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The items that latent vectors stand for, (batch, latent_dim) → (batch, *item)."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor:
        """What is left of x after its way through the latent vector, (batch, *item)."""
        return self.decode(self.encode(x))

    def restore(self, x: Tensor, mask: Tensor) -> Tensor:
        """Clean items for noisy ones, (batch, *item); `mask` is 1 where `blank` took a value away.

        By default the reconstruction, which is not told of the mask.
        """
        del mask
        return self.reconstruct(x)

    def blank(self, x: Tensor, mask: Tensor) -> Tensor:
        """Items with what is masked at the value that stands for missing: by default zero."""
        return x * (1 - mask)

    def standardise(self, x: Tensor) -> Tensor:
        """Items in the units that errors are counted in, (batch, *item): by default their own."""
        return x

    def trace(self, x: Tensor) -> Tensor:
        """What encoding x passes through, (batch, numbers); the last latent_dim of them are the latent vector."""
        return self.encode(x)

    def observe(self, x: Tensor, noise: Tensor, sigma: float, wants: list[str]) -> dict[str, Tensor]:
        """What scores are made of; each value has a row per item.

        Always `x` and `y`, the item and its reconstruction, flat, in the units of errors. By name among `wants`:
        `latent`; `path`, how far the reconstruction is from the item, and how far its encoding is from the item's at
        every step; `companion`, the same of a network beside it; `restoration`, the mean squared error of what becomes
        of the item with noise; `likelihood` and `divergence` of a variational network.

        Args:
            x: (batch, *item).
            noise: (draws, *item), standard normal, the same for every item.
            sigma: by which it is multiplied, in the units of errors.
            wants: names.
        """
        trace = self.trace(x)
        latent = trace[:, trace.shape[1] - self.latent_dim :]  # type: ignore[operator]
        reconstruction = self.decode(latent)
        target, answer = self.standardise(x), self.standardise(reconstruction)
        seen = {"x": target.flatten(1), "y": answer.flatten(1)}
        if "latent" in wants:
            seen["latent"] = latent
        if "path" in wants:
            residual = pooled(answer - target, 32).flatten(1)
            seen["path"] = torch.cat([residual, self.trace(reconstruction) - trace], dim=1)
        if "restoration" in wants:
            seen["restoration"] = self.restoration(x, noise, sigma)
        if "companion" in wants:
            seen["companion"] = self.companion_path(x)
        if "likelihood" in wants:
            seen.update(self.nats(target, answer))
        return seen

    def companion_path(self, x: Tensor) -> Tensor:
        """Of a network with a companion: `path` as the companion goes it."""
        del x
        raise NotImplementedError

    def nats(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Of a variational network: `likelihood` and `divergence`, (batch,) each, for an item and its reconstruction.

        Both in the units of errors, (batch, *item).
        """
        del x, y
        raise NotImplementedError

    def restoration(self, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Mean squared error of what becomes of x with each noise, (batch,)."""
        total = torch.zeros_like(x.flatten(1)[:, 0])
        for draw in range(noise.shape[0]):
            restored = self.reconstruct(self.add_noise(x, sigma * noise[draw]))
            total = total + (self.standardise(restored) - self.standardise(x)).square().flatten(1).mean(1)
        return total / max(1, noise.shape[0])

    def add_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """X with noise in the units of errors, as in training: by default clipped to the range of pictures."""
        return (x + noise).clamp(0.0, 1.0)

    def prepare(self, items: Tensor) -> None:
        """Called once before training with training items, (items, *item): takes constants from the data."""

    def advance(self, fraction: float) -> None:
        """Called before each training step: so much of the training is done, 0 to 1."""

    def corrupt(self, x: Tensor, corruption: Corruption, noise: Noise) -> Corrupted:
        """The items as the network shall see them in training."""
        return corrupt(x, corruption, noise)

    def loss(self, x: Tensor, mask: Tensor | None, target: Tensor, noise: Noise) -> Tensor:
        """The scalar to minimise: by default the mean squared error.

        Args:
            x: what the network sees, (batch, *item), perhaps corrupted.
            mask: 1 where a value was taken away, (batch, 1, height, width) or (batch, features); None: nowhere.
            target: what it should answer, (batch, *item).
            noise: where a stochastic network draws from.
        """
        del mask, noise
        return mean_squared_error(self.reconstruct(x), target).mean()

    def standardise_latent(self, x: Tensor) -> None:
        """Called once after training with training items: scales the code where that is possible exactly."""

    def latent_draws(self, x: Tensor, noise: Noise) -> Tensor:
        """Latent vectors as the decoder met them in training, (batch, latent_dim): what a sampler should imitate."""
        del noise
        return self.encode(x)

    def figures(self, x: Tensor, noise: Noise) -> dict[str, Figure]:
        """Quality figures of this family alone, by name; by default none."""
        del x, noise
        return {}


def pooled(x: Tensor, most: int) -> Tensor:
    """Pictures shrunk by whole factors until no side is above `most`; anything else as it is."""
    if x.dim() != 4:
        return x
    factor = (max(x.shape[2], x.shape[3]) + most - 1) // most
    return x if factor == 1 else functional.avg_pool2d(x, factor, factor, 0, True)
