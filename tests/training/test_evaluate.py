from __future__ import annotations

import math

import pytest
import torch

from app.artifacts.manifest import Capability
from training.data import Dataset, to_float
from training.evaluate import NOISES, add_noise, pca_mse, psnr_db


def test_psnr_is_the_definitions() -> None:
    """A constant error of .1 on a range of 1 is 20 dB; no error is the ceiling."""
    clean = torch.zeros(2, 1, 4, 4)
    found = torch.stack([torch.full((1, 4, 4), 0.1), torch.zeros(1, 4, 4)])
    assert psnr_db(found, clean).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


@pytest.mark.parametrize("kind", NOISES)
def test_evaluation_noise_is_always_the_same(kind: str) -> None:
    """Two artifacts are judged on the same noise."""
    x = torch.rand(8, 1, 8, 8)
    assert torch.equal(add_noise(x, kind), add_noise(x, kind))
    assert not torch.equal(add_noise(x, kind), x)


def test_pca_error_is_the_eigenvalues_left_out(digits: Dataset) -> None:
    """On its own training items PCA loses exactly the variance of the components that it lacks."""
    x = to_float(digits.items).flatten(1).double()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    found = pca_mse(digits.items, digits.items, 10)
    assert found is not None
    assert math.isclose(found, float(eigenvalues[10:].sum()) / 64, rel_tol=1e-4)


def test_pca_that_would_lose_nothing_is_no_baseline(digits: Dataset) -> None:
    """There is no PCA figure where it would be zero by construction."""
    assert pca_mse(digits.items, digits.items, 64) is None
    assert pca_mse(digits.items[:10], digits.items, 10) is None


def test_large_pictures_get_a_randomised_baseline() -> None:
    """Beyond the exact solver's size PCA still gives a figure."""
    images = torch.randint(0, 256, (60, 3, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = pca_mse(images[:40], images[40:], 5)
    assert found is not None
    assert 0 < found < 0.2


def test_reasons_state_measured_figures(tiny_store: object) -> None:
    """What an artifact cannot do comes with figures, and never for what it can do."""
    from pathlib import Path

    from training.run import open_artifact

    assert isinstance(tiny_store, Path)
    variational = open_artifact("tiny-variational", tiny_store).manifest
    assert set(variational.unsupported) == {Capability.DENOISE, Capability.INPAINT}
    reason = variational.unsupported[Capability.DENOISE]
    before = variational.metrics["psnr_of_reconstruction_sigma_0.5"]
    assert f"from {before.baselines['noisy_input']:.1f} to {before.value:.1f} dB" in reason
    assert set(open_artifact("tiny-denoising", tiny_store).manifest.unsupported) == {Capability.INPAINT}
