"""Where new latent vectors come from: a Gaussian mixture of held-out ones, or the prior; the part that is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor, nn

FEWEST_OF_A_CLASS = 10
ROWS_PER_DIMENSION = 2
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sampling:
    """What `sample` draws its latent vectors from.

    `mixture`: normal components fitted on held-out latent vectors, as many as the Bayesian information criterion likes,
    for each class by itself where there are labels. `prior`: N(0, I), for networks trained towards it.
    """

    source: Literal["mixture", "prior"] = "mixture"
    max_dimensions: PositiveInt = 64  # of latent vectors with more numbers: their first principal components
    max_components: PositiveInt = 32  # without labels; with them a quarter of it for each class


class Sampler(nn.Module):
    """Uniform and normal noise to latent vectors; each row by itself, decided by its arguments alone."""

    if TYPE_CHECKING:  # TorchScript would take annotations for types of its own
        cumulative: Tensor
        means: Tensor
        roots: Tensor
        basis: Tensor
        offset: Tensor

    def __init__(self, shares: Floats, means: Floats, roots: Floats, basis: Floats, offset: Floats) -> None:
        """A mixture in the coordinates of `basis`.

        Args:
            shares: (1 + classes, components): first of all items, then of each class; rows sum to one.
            means: (components, dimensions).
            roots: (components, dimensions, dimensions): Cholesky factors of the covariances.
            basis: (dimensions, latent_dim).
            offset: (latent_dim,).
        """
        super().__init__()
        self.dimensions = means.shape[1]
        arrays = {"cumulative": shares.cumsum(1), "means": means, "roots": roots, "basis": basis, "offset": offset}
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)))

    def forward(self, u: Tensor, eps: Tensor, label: Tensor) -> Tensor:
        """(batch,) in [0, 1), (batch, latent_dim) standard normal, (batch,) class or -1 → (batch, latent_dim)."""
        row = (label.long() + 1).clamp(0, self.cumulative.shape[0] - 1)
        component = (u[:, None] >= self.cumulative[row]).sum(1).clamp(0, self.means.shape[0] - 1)
        # In double: the last digits of a product depend on how many rows share it, and decoders magnify them.
        noise = torch.bmm(self.roots[component], eps[:, : self.dimensions, None].double())[:, :, 0]
        return ((self.means[component] + noise) @ self.basis + self.offset).float()


def prior_sampler(latent_dim: int) -> Sampler:
    """Draws from N(0, I)."""
    identity = np.eye(latent_dim)
    return Sampler(np.ones((1, 1)), np.zeros((1, latent_dim)), identity[None], identity, np.zeros(latent_dim))


def fit_sampler(latents: Tensor, labels: Tensor | None, classes: int, sampling: Sampling) -> tuple[Sampler, bool]:
    """A sampler of latent vectors like these.

    Args:
        latents: (items, latent_dim), of items that the network was not trained on.
        labels: (items,), of `classes` classes.

    Returns:
        The sampler, and whether it knows classes: if each has at least FEWEST_OF_A_CLASS items.
    """
    z = latents.double().numpy()
    latent_dim = z.shape[1]
    if sampling.source == "prior":
        return prior_sampler(latent_dim), False
    offset = z.mean(0)
    dimensions = max(1, min(latent_dim, sampling.max_dimensions, len(z) // (2 * ROWS_PER_DIMENSION)))
    basis = np.eye(latent_dim)
    if dimensions < latent_dim:
        _, vectors = np.linalg.eigh(np.cov(z, rowvar=False, bias=True))
        basis = vectors[:, ::-1][:, :dimensions].T  # (dimensions, latent_dim)
    coordinates = (z - offset) @ basis.T
    counts = [] if labels is None else [int((labels == c).sum()) for c in range(classes)]
    conditional = classes > 1 and bool(counts) and min(counts) >= FEWEST_OF_A_CLASS
    if not conditional or labels is None:
        weights, means, covariances = _mixture(coordinates, sampling.max_components)
        return Sampler(weights[None], means, np.linalg.cholesky(covariances), basis, offset), False
    parts = [_mixture(coordinates[(labels == c).numpy()], max(1, sampling.max_components // 4)) for c in range(classes)]
    sizes = [len(weights) for weights, _, _ in parts]
    shares = np.zeros((1 + classes, sum(sizes)))
    for c, (weights, _, _) in enumerate(parts):
        first = sum(sizes[:c])
        shares[1 + c, first : first + sizes[c]] = weights
        shares[0, first : first + sizes[c]] = weights * counts[c] / sum(counts)
    means, covariances = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    return Sampler(shares, means, np.linalg.cholesky(covariances), basis, offset), True


def _mixture(points: Floats, most_components: int) -> tuple[Floats, Floats, Floats]:
    """Weights, means and covariances of the mixture with the best Bayesian information criterion."""
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415  # slow to import

    # A spread of a thousandth of the points' own keeps covariances of few points invertible.
    floor = 1e-3 * float(points.var(0).mean()) + 1e-6
    best, best_criterion = None, np.inf
    components = 1
    while components <= most_components and components * ROWS_PER_DIMENSION * points.shape[1] <= max(
        len(points), ROWS_PER_DIMENSION * points.shape[1]
    ):
        mixture = GaussianMixture(components, reg_covar=floor, random_state=0, max_iter=100, tol=1e-2).fit(points)
        criterion = mixture.bic(points)
        if criterion >= best_criterion:
            break
        best, best_criterion = mixture, criterion
        components *= 2
    if best is None:
        raise ValueError("mixture: expected at least one component")
    return best.weights_, best.means_, best.covariances_
