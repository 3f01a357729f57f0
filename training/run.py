"""From a preset and a data set to an artifact: split, train, export, calibrate, evaluate, write, verify."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from app.artifacts.manifest import (
    Capability,
    DataProvenance,
    FileEntry,
    Manifest,
    Metric,
    SelfTest,
    TrainingProvenance,
)
from app.artifacts.store import Artifact, ArtifactRef, list_artifacts, read_artifact, write_artifact
from app.errors import ArtifactRefused
from training.autoencoders import AUTOENCODERS, Autoencoder
from training.calibrate import CALIBRATION_FILE, calibrate
from training.data import Dataset, to_unit
from training.errors import TrainingError
from training.evaluate import evaluate, family_figures, unsupported
from training.export import (
    ExportedModule,
    export,
    method_inputs,
    self_test_differences,
    self_test_vectors,
    signatures,
)
from training.loop import Progress, computes_in_bfloat16, generator, train
from training.presets import Preset
from training.splits import PARTS, Split, split_dataset

MODEL_FILE = "model.pt"
SELF_TEST_FILE = "self_test.npz"
SELF_TEST_ROWS = 5
EXPORT_CHECK_ROWS = 64
STANDARDISING_ITEMS = 2000

_PENDING = FileEntry(sha256="0" * 64, bytes=0)  # the store replaces it by the facts


@dataclass(frozen=True)
class Difference:
    """How far an artifact's module is from its own self-test vectors on this machine."""

    capability: Capability
    largest: float
    within_tolerance: bool


def make_artifact(
    preset: Preset,
    dataset: Dataset,
    *,
    name: str,
    store: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
    default_for: Sequence[Capability] = (),
    say: Callable[[str], None] = lambda _: None,
) -> ArtifactRef:
    """Trains a preset and writes the artifact as the name's next version.

    Raises TrainingError; then nothing was written.
    """
    network = build_network(preset, dataset.item_shape, seed)
    if unable := [capability for capability in default_for if capability not in network.capabilities]:
        raise TrainingError(f"default-for: preset {preset.name} cannot {', '.join(unable)}")
    _check_writable(store)
    split = split_dataset(dataset, seed)
    parts = {part: dataset.images[getattr(split, part)] for part in PARTS}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    say(
        f"{dataset.name}: {', '.join(f'{count} {part}' for part, count in split.counts.items())} items of "
        f"{' × '.join(map(str, dataset.item_shape))}; {preset.name}: {parameters:,} parameters on {device}, "
        f"{torch.get_num_threads()} threads"
    )

    start = time.perf_counter()
    try:
        network, epochs = train(
            network,
            parts["train"],
            parts["validation"],
            preset.optimisation,
            preset.corruption,
            seed=seed,
            device=device,
            progress=progress,
        )
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"{device}: out of memory; choose a smaller --batch-size or --image-size") from error
    network = network.cpu()
    network.standardise_latent(to_unit(parts["train"][:STANDARDISING_ITEMS]))
    wall_time_s = time.perf_counter() - start

    say("exporting, calibrating, evaluating")
    model = export(network, _rows(parts["test"], EXPORT_CHECK_ROWS), generator(seed, "export"))
    exported = ExportedModule(model)
    calibration, entry, scores = calibrate(exported, parts["calibration"], f"{dataset.name}, calibration part")
    protocol = f"{dataset.name} test part, {len(parts['test'])} items, training seed {seed}"
    metrics = evaluate(
        exported,
        train=parts["train"],
        test=parts["test"],
        latent_dim=network.latent_dim,
        calibration=calibration,
        protocol=protocol,
    ) | family_figures(network, parts["test"], protocol)
    metrics["validation_mse"] = Metric(
        value=epochs[-1].validation_mse,
        unit="squared error per value",
        protocol=f"{dataset.name} validation part, {len(parts['validation'])} items, training seed {seed}",
    )
    methods = signatures(network.capabilities, dataset.item_shape, network.latent_dim)
    rows = method_inputs(
        network.capabilities, network.latent_dim, _rows(parts["test"], SELF_TEST_ROWS), generator(seed, "self-test")
    )
    manifest = Manifest(
        name=name,
        version=1,  # replaced by the store, like `files`
        description=f"{preset.name} ({preset.purpose}), trained on {dataset.name}",
        created_at=datetime.now(UTC).replace(microsecond=0),
        torch_version=torch.__version__,
        files={MODEL_FILE: _PENDING, CALIBRATION_FILE: _PENDING, SELF_TEST_FILE: _PENDING},
        model_file=MODEL_FILE,
        input=dataset.input_spec,
        latent_dim=network.latent_dim,
        capabilities=methods,
        unsupported=unsupported(network.capabilities, metrics),
        default_for=tuple(default_for),
        max_batch_size=preset.max_batch_size,
        calibration=entry,
        self_test=SelfTest(file=SELF_TEST_FILE),
        metrics=metrics,
        training=_provenance(preset, dataset, split, seed, device, wall_time_s, parameters),
    )
    files = {
        MODEL_FILE: model,
        CALIBRATION_FILE: scores,
        # By a module fresh from its file, as the service's is when it runs them.
        SELF_TEST_FILE: self_test_vectors(ExportedModule(model), methods, rows),
    }
    ref = write_artifact(store, manifest, files)
    if failed := [d for d in verify_artifact(read_artifact(ref)) if not d.within_tolerance]:
        shutil.rmtree(ref.path)
        raise TrainingError(f"{ref}: self-test: {failed[0].capability} differs by {failed[0].largest:.2g}")
    return ref


def build_network(preset: Preset, item_shape: tuple[int, ...], seed: int) -> Autoencoder:
    """The preset's network, initialised by the seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AUTOENCODERS[preset.architecture](item_shape, preset.network)


def open_artifact(reference: str, store: Path) -> Artifact:
    """A verified artifact by `name` (its highest version) or `name:version`. Raises TrainingError."""
    name, _, version = reference.partition(":")
    refs = [ref for ref in list_artifacts(store) if ref.name == name and version in ("", str(ref.version))]
    if not refs:
        known = ", ".join(map(str, list_artifacts(store))) or "none"
        raise TrainingError(f"artifact: expected one of {known} in {store}; found {reference!r}")
    try:
        return read_artifact(refs[-1])
    except ArtifactRefused as error:
        raise TrainingError(f"{refs[-1]}: {error}") from error


def verify_artifact(artifact: Artifact) -> list[Difference]:
    """Runs an artifact's self-test on this machine's CPU. Raises TrainingError if the module cannot be run at all."""
    manifest = artifact.manifest
    try:
        vectors = artifact.self_test_vectors()
        artifact.calibration()
    except ArtifactRefused as error:
        raise TrainingError(f"{artifact.ref}: {error}") from error
    tolerance = manifest.self_test
    differences = []
    for capability, found, expected in self_test_differences(
        ExportedModule(artifact.model), manifest.capabilities, vectors
    ):
        difference = abs(found - expected)
        allowed = tolerance.absolute_tolerance + tolerance.relative_tolerance * abs(expected)
        differences.append(Difference(capability, float(difference.max()), bool((difference <= allowed).all())))
    return differences


def evaluate_artifact(artifact: Artifact, dataset: Dataset) -> tuple[dict[str, Metric], bool]:
    """An artifact's test figures measured anew.

    Returns:
        The figures, and whether data and split are the very ones that the artifact was made from.

    Raises TrainingError if the data's items have another shape, or the artifact gives no scores.
    """
    manifest = artifact.manifest
    if dataset.item_shape != manifest.input.shape:
        raise TrainingError(
            f"data {dataset.name}: expected items of {manifest.input.shape}, found {dataset.item_shape}"
        )
    calibration = artifact.calibration()
    if calibration is None or manifest.latent_dim is None:
        raise TrainingError(f"{artifact.ref}: expected an artifact with calibration and latent_dim, found none")
    seed = manifest.training.seed
    split = split_dataset(dataset, seed)
    metrics = evaluate(
        ExportedModule(artifact.model),
        train=dataset.images[split.train],
        test=dataset.images[split.test],
        latent_dim=manifest.latent_dim,
        calibration=calibration,
        protocol=f"{dataset.name} test part, {len(split.test)} items, training seed {seed}",
    )
    return metrics, split.sha256 == manifest.training.data.split_sha256


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`. Raises TrainingError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrainingError(f"device: found {name}, but {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    return device


def _check_writable(store: Path) -> None:
    """Found out before the training, not after it."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass
    except OSError as error:
        raise TrainingError(f"store {store}: expected a folder to write to: {error.strerror}") from error


def _rows(images: Tensor, rows: int) -> Tensor:
    """So many float32 items from the front of `images`, starting over where there are fewer."""
    return to_unit(images[torch.arange(rows) % len(images)])


def _provenance(
    preset: Preset,
    dataset: Dataset,
    split: Split,
    seed: int,
    device: torch.device,
    wall_time_s: float,
    parameters: int,
) -> TrainingProvenance:
    in_bfloat16 = preset.optimisation.bfloat16 and computes_in_bfloat16(device)
    return TrainingProvenance(
        preset=preset.name,
        data=DataProvenance(name=dataset.name, sha256=dataset.sha256, split_sha256=split.sha256, counts=split.counts),
        seed=seed,
        config=preset.config | {"computed_in_bfloat16": in_bfloat16},
        epochs=preset.optimisation.epochs,
        wall_time_s=round(wall_time_s, 1),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        parameters=parameters,
    )
