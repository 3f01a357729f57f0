from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.artifacts.manifest import Capability, Manifest
from app.artifacts.store import Artifact, list_artifacts
from training.data import load_dataset
from training.export import ExportedModule
from training.models import SHIPPED_MODELS
from training.presets import PRESETS
from training.run import evaluate_artifact, open_artifact, verify_artifact

STORE = Path(__file__).parents[2] / "models_store"
ROOT = os.environ.get("HOURGLASS_DATA_ROOT")
LARGEST_BYTES = 4_000_000
NAMES = [model.name for model in SHIPPED_MODELS]


@pytest.fixture(scope="module", params=NAMES)
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return open_artifact(request.param, STORE)


def manifests() -> list[Manifest]:
    return [open_artifact(name, STORE).manifest for name in NAMES]


def test_the_table_is_what_is_shipped() -> None:
    """The store has the table's artifacts, made by their presets as committed, for what the table prefers them."""
    assert {ref.name for ref in list_artifacts(STORE)} >= set(NAMES)
    for model in SHIPPED_MODELS:
        manifest = open_artifact(model.name, STORE).manifest
        assert manifest.training.preset == model.preset
        assert manifest.training.data.name == model.data
        assert (manifest.training.seed, manifest.training.threads) == (model.seed, model.threads)
        assert manifest.default_for == model.default_for
        current = json.loads(json.dumps(PRESETS[model.preset].config))
        for section in current.keys() & manifest.training.config.keys():
            stated = manifest.training.config[section]
            if isinstance(stated, dict):  # what settings there were when it was made are the preset's still
                assert stated == {key: current[section][key] for key in stated}


def test_shipped_artifacts_pass_their_self_test(artifact: Artifact) -> None:
    """Every shipped artifact is whole and reproduces its vectors on this machine, frozen as the service freezes it."""
    differences = verify_artifact(artifact)
    assert {difference.capability for difference in differences} == set(artifact.manifest.capabilities)
    assert all(difference.within_tolerance for difference in differences)
    assert ExportedModule(artifact.model).freeze().methods == tuple(sorted(artifact.manifest.capabilities))


def test_shipped_artifacts_are_small(artifact: Artifact) -> None:
    """All files of an artifact together stay below 4 MB."""
    assert sum(entry.bytes for entry in artifact.manifest.files.values()) <= LARGEST_BYTES


def test_shipped_artifacts_beat_pca(artifact: Artifact) -> None:
    """Each reconstructs test items better than PCA with as many components."""
    metric = artifact.manifest.metrics["test_mse"]
    assert metric.value < metric.baselines["pca"]


def test_one_reconstructs_well() -> None:
    """At least one with a latent vector of at most 64 numbers has a test error of .0065 or less."""
    assert any((m.latent_dim or 99) <= 64 and m.metrics["test_mse"].value <= 0.0065 for m in manifests())


def test_the_denoiser_denoises() -> None:
    """It gains at every stated noise but the faintest: at least 6 dB at sigma .5, and 2 dB at .25."""
    metrics = open_artifact("mnist-denoising", STORE).manifest.metrics
    gains = {name: m.value - m.baselines["noisy_input"] for name, m in metrics.items() if "noisy_input" in m.baselines}
    assert gains["psnr_sigma_0.5"] > 6
    assert gains["psnr_sigma_0.25"] > 2
    assert gains["psnr_salt_pepper_0.3"] > 6


def test_false_alarms_come_as_often_as_promised(artifact: Artifact) -> None:
    """On the test part about 1 % and 5 % of normal items are flagged at these targets."""
    metrics = artifact.manifest.metrics
    assert metrics["realised_fpr_at_0.01"].value == pytest.approx(0.01, abs=0.006)
    assert metrics["realised_fpr_at_0.05"].value == pytest.approx(0.05, abs=0.015)


def test_every_capability_has_one_default() -> None:
    """Without a model in the request, what any artifact can do leads to exactly one; scores lead to mnist-conv."""
    able = {capability for m in manifests() for capability in m.capabilities}
    preferred = {capability: [m.name for m in manifests() if capability in m.default_for] for capability in able}
    assert all(len(preferred[capability]) == 1 for manifest in manifests() for capability in manifest.capabilities)
    assert preferred[Capability.ANOMALY_SCORE] == ["mnist-conv"]


@pytest.mark.skipif(not ROOT, reason="needs HOURGLASS_DATA_ROOT with MNIST")
def test_shipped_figures_are_reproducible() -> None:
    """Measured anew on MNIST, the figures are the manifest's."""
    artifact = open_artifact("mnist-conv", STORE)
    metrics, same_split = evaluate_artifact(artifact, load_dataset("mnist", Path(ROOT or "")))
    assert same_split
    stated = artifact.manifest.metrics
    measured = metrics.keys() & stated.keys()  # figures that are newer than the artifact are not in its manifest
    assert measured >= {"test_mse", "psnr_sigma_0.5", "realised_fpr_at_0.01", "realised_fpr_at_0.05"}
    for name in measured:
        assert metrics[name].value == pytest.approx(stated[name].value, rel=1e-3)
