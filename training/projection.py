"""A map of the latent space: the two directions in which held-out items differ most, and where some of them lie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from app.artifacts.manifest import ProjectionEntry
from training.export import npz_bytes

PROJECTION_FILE = "projection.npz"
MOST_POINTS = 2000


def fit_projection(latents: Tensor, labels: Tensor | None) -> tuple[ProjectionEntry, bytes]:
    """A map by the first two principal components.

    Args:
        latents: (items, latent_dim) of held-out items.
        labels: (items,), or None.

    Returns:
        Its entry in the manifest, and the bytes of PROJECTION_FILE.
    """
    z = latents.double().numpy()
    mean = z.mean(0)
    _, vectors = np.linalg.eigh(np.atleast_2d(np.cov(z, rowvar=False, bias=True)))
    components = np.zeros((2, z.shape[1]))
    found = vectors[:, ::-1][:, :2].T
    # An eigenvector's sign is arbitrary: the largest entry points up, so that maps of one seed look alike.
    largest = np.abs(found).argmax(1)
    components[: len(found)] = found * np.sign(found[np.arange(len(found)), largest])[:, None]
    shown = z[:MOST_POINTS]
    of_shown = np.full(len(shown), -1) if labels is None else labels[: len(shown)].numpy()
    arrays = {
        "mean": mean.astype(np.float32),
        "components": components.astype(np.float32),
        "points": ((shown - mean) @ components.T).astype(np.float32),
        "labels": of_shown.astype(np.int32),
    }
    return ProjectionEntry(file=PROJECTION_FILE, method="pca", count=len(shown)), npz_bytes(arrays)


def shuffled(count: int, seed: int) -> Tensor:
    """An order of so many items in which the first ones are a fair choice."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
