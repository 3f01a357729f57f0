from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from app.artifacts.manifest import Capability
from training.data import Dataset, load_dataset
from training.errors import TrainingError
from training.presets import PRESETS, Preset, override
from training.progress import Silent
from training.run import choose_device, evaluate_artifact, make_artifact, open_artifact, verify_artifact
from training.splits import split_dataset


def make(preset: Preset, dataset: Dataset, store: Path, **options: object) -> None:
    device = torch.device("cpu")
    make_artifact(
        preset,
        dataset,
        name="made",
        store=store,
        seed=0,
        device=device,
        progress=Silent(),
        **options,  # type: ignore[arg-type]
    )


def test_every_preset_makes_a_sound_artifact(preset: Preset, digits: Dataset, tmp_path: Path) -> None:
    """Each preset trains, exports and verifies on digits; the manifest says how, and what it can do."""
    make(preset, digits, tmp_path)
    artifact = open_artifact("made", tmp_path)
    manifest = artifact.manifest
    differences = verify_artifact(artifact)
    assert {difference.capability for difference in differences} == set(manifest.capabilities)
    assert all(difference.within_tolerance for difference in differences)
    assert set(manifest.capabilities) | set(manifest.unsupported) == set(Capability)
    assert manifest.training.preset == preset.name
    assert manifest.training.config["optimisation"]["epochs"] == 1
    assert manifest.training.data.split_sha256 == split_dataset(digits, 0).sha256
    assert (manifest.calibration is not None) == (Capability.ANOMALY_SCORE in manifest.capabilities)
    if manifest.calibration is not None:
        assert manifest.calibration.count == manifest.training.data.counts["calibration"]
    assert ("test_mse" in manifest.metrics) == (Capability.RECONSTRUCT in manifest.capabilities)
    if Capability.SAMPLE in manifest.capabilities:
        assert manifest.labels == digits.label_names
        assert manifest.projection is not None
        assert "sample_distance_to_training" in manifest.metrics
    assert manifest.interpolation == (
        "spherical"
        if preset.name in ("vae", "vae-tutorial", "beta-vae", "conv-vae") or preset.name == "iwae"
        else "linear"
    )


def test_the_same_seed_makes_the_same_files(preset: Preset, digits: Dataset, tmp_path: Path) -> None:
    """Two runs differ in their manifests' times only."""
    make(preset, digits, tmp_path)
    make(preset, digits, tmp_path)
    first, again = (open_artifact(f"made:{version}", tmp_path) for version in (1, 2))
    assert hashlib.sha256(first.model).hexdigest() == hashlib.sha256(again.model).hexdigest()
    assert first.manifest.files == again.manifest.files
    timeless = {"version", "created_at", "training"}
    assert first.manifest.model_dump(exclude=timeless) == again.manifest.model_dump(exclude=timeless)


def test_colour_pictures_of_a_folder_train(picture_folder: Path, tmp_path: Path) -> None:
    """A folder of colour pictures with damaged files among them becomes an artifact; polarity is left open."""
    dataset = load_dataset(str(picture_folder), Path("unused"))
    make(override(PRESETS["conv"], ["epochs=1"]), dataset, tmp_path / "store")
    artifact = open_artifact("made", tmp_path / "store")
    assert artifact.manifest.input.shape == (3, 20, 24)
    assert artifact.manifest.input.picture is not None
    assert artifact.manifest.input.picture.polarity is None
    assert all(difference.within_tolerance for difference in verify_artifact(artifact))


def test_default_for_needs_the_capability(digits: Dataset, tmp_path: Path) -> None:
    """An artifact cannot be the default for what it cannot do; nothing is trained or written."""
    with pytest.raises(TrainingError, match="preset unet-denoiser cannot sample"):
        make(PRESETS["unet-denoiser"], digits, tmp_path, default_for=(Capability.SAMPLE,))
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_written_is_found_out_before_training(digits: Dataset, tmp_path: Path) -> None:
    """A store that is a file is refused at once."""
    (tmp_path / "store").write_text("")
    with pytest.raises(TrainingError, match=r"store .*: expected a folder to write to"):
        make(PRESETS["conv"], digits, tmp_path / "store")


def test_evaluation_reproduces_the_manifest(tiny_store: Path, digits: Dataset) -> None:
    """Measured anew, the figures are the manifest's."""
    artifact = open_artifact("tiny-denoising", tiny_store)
    metrics, same_split = evaluate_artifact(artifact, digits)
    assert same_split
    for name, metric in metrics.items():
        assert metric.value == pytest.approx(artifact.manifest.metrics[name].value, rel=1e-5)


def test_evaluation_refuses_other_shapes(tiny_store: Path, picture_folder: Path) -> None:
    """Data of another shape is refused, naming both."""
    dataset = load_dataset(str(picture_folder), Path("unused"))
    with pytest.raises(TrainingError, match=r"expected items of \(1, 8, 8\), found \(3, 20, 24\)"):
        evaluate_artifact(open_artifact("tiny-denoising", tiny_store), dataset)


def test_a_damaged_artifact_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """One changed byte in a file is named before torch reads it."""
    import shutil

    store = shutil.copytree(tiny_store, tmp_path / "store")
    model = store / "tiny-denoising" / "1" / "model.pt"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(TrainingError, match=r"tiny-denoising:1: model\.pt: sha256"):
        open_artifact("tiny-denoising", store)


def test_an_unknown_artifact_is_answered_with_the_known(tiny_store: Path) -> None:
    """The error lists what the store has."""
    with pytest.raises(TrainingError, match=r"tiny-denoising:1, tiny-variational:1 in .*; found 'tiny'"):
        open_artifact("tiny", tiny_store)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta"])
def test_impossible_devices_are_refused(name: str) -> None:
    """A device that there is none of is one clear error."""
    with pytest.raises(TrainingError, match="device: "):
        choose_device(name)
