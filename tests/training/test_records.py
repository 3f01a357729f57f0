"""Records from a table to a verified artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.artifacts.manifest import Capability
from training.data import Dataset
from training.presets import PRESETS, override
from training.progress import Silent
from training.run import make_artifact, open_artifact, verify_artifact


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if "records" in preset.takes])
def test_records_become_a_sound_artifact(name: str, records: Dataset, tmp_path: Path) -> None:
    """Every preset that takes records makes an artifact that names its features and beats the mean in its own units."""
    make_artifact(
        override(PRESETS[name], ["optimisation.epochs=20", "optimisation.batch_size=50", "optimisation.ema_decay=0.9"]),
        records,
        name="made",
        store=tmp_path,
        seed=0,
        device=torch.device("cpu"),
        progress=Silent(),
    )
    artifact = open_artifact("made", tmp_path)
    manifest = artifact.manifest
    assert manifest.input.features == records.features
    assert manifest.input.range is None
    assert all(difference.within_tolerance for difference in verify_artifact(artifact))
    assert manifest.metrics["test_mse"].value < 1
    assert "variance" in manifest.metrics["test_mse"].unit
    if name == "denoising-records":
        gain = manifest.metrics["psnr_inpainted"]
        assert {Capability.DENOISE, Capability.INPAINT} <= set(manifest.capabilities)
        assert gain.value > gain.baselines["left_blank"]
