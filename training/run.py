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
    ProjectionEntry,
    SelfTest,
    TrainingProvenance,
)
from app.artifacts.store import Artifact, ArtifactRef, list_artifacts, read_artifact, write_artifact
from app.errors import ArtifactRefused
from training.autoencoders import Autoencoder
from training.calibrate import CALIBRATION_FILE, calibrate, scores_of
from training.dataset import Dataset, to_float
from training.errors import TrainingError
from training.evaluate import evaluate, family_figures, unsupported
from training.export import (
    TOLERANCE,
    ExportedModule,
    export,
    method_inputs,
    self_test_differences,
    self_test_vectors,
    signatures,
)
from training.labelled import Judged, Labelled, judge, learn_weights, metrics_of
from training.loop import (
    EVALUATION_BATCH_SIZE,
    Checkpoints,
    Epoch,
    Progress,
    computes_in_bfloat16,
    train,
)
from training.noise import Noise, generator
from training.presets import Preset, build_network
from training.processes import Processes
from training.projection import PROJECTION_FILE, fit_projection, shuffled
from training.sampler import Sampler, Sampling, fit_sampler
from training.scores import fit_scorer
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


@dataclass(frozen=True)
class Trained:
    """A network as its training left it."""

    network: Autoencoder
    epochs: list[Epoch]
    wall_time_s: float


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
    checkpoints: Checkpoints | None = None,
    max_minutes: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> ArtifactRef | None:
    """Trains a preset and writes the artifact as the name's next version.

    Of several processes the first one writes, and answers with where; the others answer None.

    Raises TrainingError, and Interrupted; then nothing was written.
    """
    processes = processes or Processes()
    check_fits(preset, dataset, default_for)
    _check_writable(store)
    split = split_dataset(dataset, seed)
    trained = train_preset(
        preset,
        dataset,
        split,
        seed=seed,
        device=device,
        progress=progress,
        say=say,
        checkpoints=checkpoints,
        max_minutes=max_minutes,
        stop=stop,
        processes=processes,
    )
    ref = None
    if processes.writes:
        ref = finish(
            preset,
            dataset,
            split,
            trained,
            name=name,
            store=store,
            seed=seed,
            device=device,
            default_for=default_for,
            say=say,
        )
    processes.wait()
    return ref


def check_fits(preset: Preset, dataset: Dataset, default_for: Sequence[Capability] = ()) -> None:
    """Raises TrainingError if the preset takes no such items, or cannot do what it shall be the default for."""
    if unable := [capability for capability in default_for if capability not in preset.capabilities]:
        raise TrainingError(f"default-for: preset {preset.name} cannot {', '.join(unable)}")
    build_network(preset, dataset.item_shape, 0)


def train_preset(
    preset: Preset,
    dataset: Dataset,
    split: Split,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    say: Callable[[str], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
    max_minutes: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> Trained:
    """The preset's network, trained on the training part. Raises TrainingError, and Interrupted."""
    network = build_network(preset, dataset.item_shape, seed)
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
            dataset.items[split.train],
            dataset.items[split.validation],
            preset.optimisation,
            preset.corruption,
            seed=seed,
            device=device,
            progress=progress,
            checkpoints=checkpoints,
            max_minutes=max_minutes,
            stop=stop,
            processes=processes,
        )
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"{device}: out of memory; choose a smaller --batch-size or --image-size") from error
    network = network.cpu()
    network.standardise_latent(to_float(dataset.items[split.train[:STANDARDISING_ITEMS]]))
    saved = None if checkpoints is None else checkpoints.load()
    # Over all of the run's processes, were it interrupted.
    wall_time_s = time.perf_counter() - start if saved is None else float(saved["elapsed_s"])
    return Trained(network, epochs, wall_time_s)


def finish(
    preset: Preset,
    dataset: Dataset,
    split: Split,
    trained: Trained,
    *,
    name: str,
    store: Path,
    seed: int,
    device: torch.device,
    default_for: Sequence[Capability] = (),
    say: Callable[[str], None] = lambda _: None,
) -> ArtifactRef:
    """From a trained network to a written and verified artifact. Raises TrainingError; then nothing was written."""
    say("fitting the sampler, exporting, calibrating, evaluating")
    network = trained.network
    parts = {part: dataset.items[getattr(split, part)] for part in PARTS}
    latents = _held_out_latents(network, dataset, split, preset.sampling, seed)
    labels = dataset.label_names if latents.conditional else None
    classes = len(labels or ())
    scorer = None
    if Capability.ANOMALY_SCORE in network.capabilities:
        # The validation part measures evidence, the calibration part is left for what comes of it.
        scorer = fit_scorer(network.eval(), preset.scoring, parts["train"], parts["validation"])
    model = export(
        network, _rows(parts["test"], EXPORT_CHECK_ROWS), generator(seed, "export"), scorer, latents.sampler, classes
    )
    exported = ExportedModule(model)
    files = {MODEL_FILE: model}
    calibration, entry = None, None
    if Capability.ANOMALY_SCORE in network.capabilities:
        calibration, entry, files[CALIBRATION_FILE] = calibrate(
            exported, parts["calibration"], f"{dataset.name}, calibration part"
        )
    if latents.projection is not None:
        files[PROJECTION_FILE] = latents.projection[1]
    protocol = f"{dataset.name} test part, {len(parts['test'])} items, training seed {seed}"
    metrics = evaluate(
        exported,
        train=parts["train"],
        test=parts["test"],
        latent_dim=network.latent_dim,
        calibration=calibration,
        protocol=protocol,
        classes=classes,
    ) | family_figures(network, parts["test"], protocol)
    metrics["validation_mse"] = Metric(
        value=trained.epochs[-1].validation_mse,
        unit="squared error per value",
        protocol=f"{dataset.name} validation part, {len(parts['validation'])} items, training seed {seed}",
    )
    components = () if scorer is None else tuple(scorer.names)
    methods = signatures(network.capabilities, dataset.item_shape, network.latent_dim, classes, parts=len(components))
    rows = method_inputs(
        network.capabilities,
        network.latent_dim,
        _rows(parts["test"], SELF_TEST_ROWS),
        generator(seed, "self-test"),
        classes,
    )
    # By a module fresh from its file, as the service's is when it runs them.
    files[SELF_TEST_FILE] = self_test_vectors(ExportedModule(model), methods, rows)
    manifest = Manifest(
        name=name,
        version=1,  # replaced by the store, like `files`
        description=f"{preset.name} ({preset.purpose}), trained on {dataset.name}",
        created_at=datetime.now(UTC).replace(microsecond=0),
        torch_version=torch.__version__,
        files=dict.fromkeys(files, _PENDING),
        model_file=MODEL_FILE,
        input=dataset.input_spec,
        latent_dim=network.latent_dim,
        capabilities=methods,
        unsupported=unsupported(network.capabilities, metrics),
        default_for=tuple(default_for),
        labels=labels,
        components=components,
        interpolation="spherical" if network.prior else "linear",
        projection=None if latents.projection is None else latents.projection[0],
        max_batch_size=preset.max_batch_size,
        calibration=entry,
        self_test=SelfTest(file=SELF_TEST_FILE, absolute_tolerance=_absolute_tolerance(parts["train"])),
        metrics=metrics,
        training=_provenance(preset, dataset, split, seed, device, trained),
    )
    ref = write_artifact(store, manifest, files)
    if failed := [d for d in verify_artifact(read_artifact(ref)) if not d.within_tolerance]:
        shutil.rmtree(ref.path)
        raise TrainingError(f"{ref}: self-test: {failed[0].capability} differs by {failed[0].largest:.2g}")
    return ref


def export_checkpoint(
    preset: Preset,
    dataset: Dataset,
    checkpoints: Checkpoints,
    *,
    name: str,
    store: Path,
    seed: int,
    default_for: Sequence[Capability] = (),
) -> ArtifactRef:
    """An artifact of the weights that a checkpoint keeps, wherever its training stands.

    Raises TrainingError if there is no checkpoint with an epoch behind it.
    """
    state = checkpoints.load()
    if state is None or not state["epochs"]:
        raise TrainingError("checkpoint: expected one with at least an epoch behind it, found none")
    split = split_dataset(dataset, seed)
    network = build_network(preset, dataset.item_shape, seed)
    network.load_state_dict(state["best"] or state["kept"] or state["network"])
    network = network.eval()
    network.standardise_latent(to_float(dataset.items[split.train[:STANDARDISING_ITEMS]]))
    trained = Trained(network, [Epoch(**epoch) for epoch in state["epochs"]], state["elapsed_s"])
    return finish(
        preset,
        dataset,
        split,
        trained,
        name=name,
        store=store,
        seed=seed,
        device=torch.device("cpu"),
        default_for=default_for,
    )


@dataclass(frozen=True)
class _HeldOut:
    """What held-out latent vectors are good for."""

    sampler: Sampler | None = None
    conditional: bool = False
    projection: tuple[ProjectionEntry, bytes] | None = None


@torch.inference_mode()
def _held_out_latents(network: Autoencoder, dataset: Dataset, split: Split, sampling: Sampling, seed: int) -> _HeldOut:
    """Sampler and map from items that the weights never saw: the validation part and the calibration part."""
    if network.latent_dim is None:
        return _HeldOut()
    indices = torch.cat([split.validation, split.calibration])
    indices = indices[shuffled(len(indices), seed)]
    network = network.eval()
    noise = Noise(generator(seed, "sampler"))
    batches = [to_float(dataset.items[batch]) for batch in torch.split(indices, EVALUATION_BATCH_SIZE)]
    latents = torch.cat([network.encode(x) for x in batches])
    draws = torch.cat([network.latent_draws(x, noise) for x in batches])
    labels = None if dataset.labels is None else dataset.labels[indices]
    if sampling.source == "prior" and not network.prior:
        raise TrainingError("sampling.source: this network has no prior; expected mixture, found prior")
    sampler, conditional = fit_sampler(draws, labels, len(dataset.label_names), sampling)
    return _HeldOut(sampler, conditional, fit_projection(latents, labels if conditional else None))


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
    seed = manifest.training.seed
    split = split_dataset(dataset, seed)
    metrics = evaluate(
        ExportedModule(artifact.model),
        train=dataset.items[split.train],
        test=dataset.items[split.test],
        latent_dim=manifest.latent_dim,
        calibration=artifact.calibration(),
        protocol=f"{dataset.name} test part, {len(split.test)} items, training seed {seed}",
        classes=len(manifest.labels or ()),
    )
    return metrics, split.sha256 == manifest.training.data.split_sha256


def recalibrate(
    artifact: Artifact, dataset: Dataset, source: str, labelled: Labelled | None = None
) -> tuple[ArtifactRef, Judged | None]:
    """The artifact's next version, with the same model and a calibration on these normal items.

    Args:
        labelled: items with known anomalies: half of them choose the weights of the score's parts, where that gains
            anything, and the other half says how well it does.

    Raises TrainingError if it gives no scores, or the items have another shape.
    """
    manifest = artifact.manifest
    for name, items in (
        (dataset.name, dataset.items),
        *([] if labelled is None else [(labelled.name, labelled.items)]),
    ):
        if tuple(items.shape[1:]) != manifest.input.shape:
            raise TrainingError(
                f"data {name}: expected items of {manifest.input.shape}, found {tuple(items.shape[1:])}"
            )
    if manifest.calibration is None:
        raise TrainingError(f"{artifact.ref}: expected an artifact that gives anomaly scores, found none")
    exported = ExportedModule(artifact.model)
    fusion = manifest.fusion if labelled is None else learn_weights(exported, labelled)
    calibration, entry, scores = calibrate(exported, dataset.items, source, fusion)
    # Measured against the old threshold: no longer this artifact's.
    stale = ("realised_fpr", "labelled_")
    metrics = {name: m for name, m in manifest.metrics.items() if not name.startswith(stale)}
    judged = None
    if labelled is not None:
        judged = judge(scores_of(exported, to_float(labelled.items), fusion), labelled, calibration)
        metrics |= metrics_of(judged, labelled)
    file = manifest.calibration.file
    changed = manifest.model_copy(
        update={
            "calibration": entry.model_copy(update={"file": file}),
            "fusion": fusion,
            "created_at": datetime.now(UTC).replace(microsecond=0),
            "metrics": metrics,
        }
    )
    return write_artifact(artifact.ref.path.parent.parent, changed, {**artifact.files, file: scores}), judged


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


def _absolute_tolerance(items: Tensor) -> float:
    """1e-5 of the largest number that an item holds, and of 1 where all are smaller."""
    return TOLERANCE * (max(1.0, float(items.abs().max())) if items.is_floating_point() else 1.0)


def _rows(images: Tensor, rows: int) -> Tensor:
    """So many float32 items from the front of `images`, starting over where there are fewer."""
    return to_float(images[torch.arange(rows) % len(images)])


def _provenance(
    preset: Preset,
    dataset: Dataset,
    split: Split,
    seed: int,
    device: torch.device,
    trained: Trained,
) -> TrainingProvenance:
    in_bfloat16 = preset.optimisation.bfloat16 and computes_in_bfloat16(device)
    return TrainingProvenance(
        preset=preset.name,
        data=DataProvenance(name=dataset.name, sha256=dataset.sha256, split_sha256=split.sha256, counts=split.counts),
        seed=seed,
        config=preset.config | {"computed_in_bfloat16": in_bfloat16},
        epochs=len(trained.epochs),
        wall_time_s=round(trained.wall_time_s, 1),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        parameters=sum(parameter.numel() for parameter in trained.network.parameters()),
    )
