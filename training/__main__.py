"""The command line: `python -m training …`. It parses, calls and prints; what it prints is computed elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from app.artifacts.manifest import NAME_PATTERN, Capability, Manifest, Metric
from app.artifacts.store import Artifact, ArtifactRef, read_artifact
from training.data import TORCHVISION_SETS, default_data_root
from training.dataset import Dataset
from training.errors import TrainingError
from training.interruption import Interruption, stop_signals
from training.labelled import Judged, labelled_items
from training.loop import Interrupted, Progress
from training.models import SHIPPED_MODELS
from training.presets import PRESETS, Preset, get_preset, override
from training.processes import Processes, joined_processes
from training.progress import Bar, Lines, Silent
from training.rehearsal import rehearse
from training.report import report
from training.run import (
    check_fits,
    choose_device,
    evaluate_artifact,
    export_checkpoint,
    make_artifact,
    open_artifact,
    recalibrate,
    verify_artifact,
)
from training.runs import REPORT_FILE, DataChoice, Recipe, Run, new_folder, settings_of_toml
from training.splits import split_dataset
from training.surfaces import write_surfaces
from training.tables import TABLE_SUFFIXES
from training.transfer import CLASSIFIER_FILE, finetune, write_classifier

DATA_HELP = (
    f"digits (offline), {', '.join(TORCHVISION_SETS)} (through torchvision), a folder of pictures, or a "
    f"{', '.join(TABLE_SUFFIXES)} file of pictures or records."
)
SHOWN_SKIPPED = 10
RUNS = Path("runs")
CLASSIFIERS = Path("classifiers")

app = typer.Typer(
    name="python -m training",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Trains autoencoders and writes them as artifacts that the service loads.\n\n"
    "First steps: `python -m training list`, then `python -m training train basic --data digits --name my-digits`.",
)
console = Console()
errors = Console(stderr=True)


class OnBad(StrEnum):
    """What to do with files and rows that cannot be used."""

    SKIP = "skip"
    FAIL = "fail"


DataOption = Annotated[str, typer.Option("--data", help=DATA_HELP)]
DataRootOption = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="HOURGLASS_DATA_ROOT", help="torchvision's root.", show_default="data"),
]
StoreOption = Annotated[Path, typer.Option("--store", envvar="HOURGLASS_MODELS_STORE", help="The artifacts' folder.")]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        help="For folders: HEIGHTxWIDTH or one number in pixels. Default: the most common size, shrunk to 128.",
    ),
]
ChannelsOption = Annotated[
    int | None, typer.Option("--channels", help="For folders: 1 (grey) or 3 (RGB). Default: 1 if all are grey.")
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option("--label-column", help="For .csv and .parquet: the column of classes. Default: `label` if there."),
]
OnBadOption = Annotated[
    OnBad, typer.Option("--on-bad", help="Unreadable files, rows without numbers: leave them out, or end it all.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; results depend on it. Default: torch's choice.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show nothing but errors and where the artifact lies.")]
TensorboardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also log to the run's folder for TensorBoard (an extra).")
]
ArtifactArgument = Annotated[str, typer.Argument(metavar="NAME[:VERSION]")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]


@app.command("train")
def train_command(
    preset_name: Annotated[str, typer.Argument(metavar="PRESET", help="One of `python -m training list`.")],
    data: DataOption,
    name: Annotated[str, typer.Option("--name", help="The artifact's name: a-z, 0-9 and . _ - after the first.")],
    store: StoreOption = Path("models_store"),
    data_root: DataRootOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Default: the preset's.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Default: the preset's.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of split, weights, order and noise.")] = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    label_column: LabelColumnOption = None,
    on_bad: OnBadOption = OnBad.SKIP,
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file of tables such as [optimisation], over the preset.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Changes a hyper-parameter; may be given again."),
    ] = None,
    default_for: Annotated[
        list[Capability] | None,
        typer.Option("--default-for", help="The service prefers this artifact for it; may be given again."),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", min=0.01, help="The schedule ends by then, if not before.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where checkpoint and metrics go. Default: runs/NAME.")
    ] = None,
    tensorboard: TensorboardOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell parameters, memory and minutes, after a few steps.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Train, calibrate, evaluate and export one artifact, and verify what was written.

    Several processes: `torchrun --nproc-per-node 2 -m training train …`, with the result of one.

    Examples:
    `python -m training train basic --data digits --name my-digits`

    `python -m training train conv --data photos/ --name my-photos --image-size 64 --epochs 20`

    `python -m training train vae --data fashion-mnist --name clothes --set latent_dim=8 --set learning_rate=5e-4`
    """
    with _one_line_errors():
        changes = [] if config is None else settings_of_toml(config)
        changes += list(settings or [])
        changes += [] if epochs is None else [f"optimisation.epochs={epochs}"]
        changes += [] if batch_size is None else [f"optimisation.batch_size={batch_size}"]
        preset = override(get_preset(preset_name), changes)
        _check_name(name)
        _use_threads(threads)
        chosen = choose_device(device)
        choice = _choice(data, data_root, image_size, channels, label_column, on_bad)
        with joined_processes(chosen) as processes:
            dataset = _load(choice, shown=processes.writes)
            check_fits(preset, dataset, tuple(default_for or ()))
            if dry_run:
                _show_rehearsal(preset, dataset, seed, chosen, max_minutes)
                return
            recipe = Recipe(
                preset=preset_name,
                settings=tuple(changes),
                config=preset.config,
                data=choice,
                data_sha256=dataset.sha256,
                name=name,
                store=store,
                seed=seed,
                device=device,
                threads=threads,
                max_minutes=max_minutes,
                default_for=tuple(default_for or ()),
            )
            split_dataset(dataset, seed)  # what it refuses shall leave no run behind
            run = Run.create(run_dir or new_folder(RUNS, name), recipe, writes=processes.writes)
            _train(run, preset, dataset, chosen, processes, tensorboard=tensorboard, quiet=quiet)


@app.command("resume")
def resume_command(folder: RunArgument, tensorboard: TensorboardOption = False, quiet: QuietOption = False) -> None:
    """Go on with a run from its last checkpoint; the result is that of a run never interrupted, bit for bit."""
    with _one_line_errors():
        run = Run.open(folder)
        if run.recipe.artifact is not None:
            raise TrainingError(f"run {folder}: finished, its artifact is {run.recipe.artifact}")
        preset = run.recipe.resolve()
        _use_threads(run.recipe.threads)
        device = choose_device(run.recipe.device)
        with joined_processes(device) as processes:
            run = Run.open(folder, writes=processes.writes)
            dataset = _load(run.recipe.data, shown=processes.writes)
            run.check_unchanged(preset, dataset)
            _train(run, preset, dataset, device, processes, tensorboard=tensorboard, quiet=quiet)


@app.command("export")
def export_command(folder: RunArgument) -> None:
    """Make an artifact of a run's last checkpoint, finished or not; the run can still be resumed."""
    with _one_line_errors():
        run = Run.open(folder)
        preset = run.recipe.resolve()
        _use_threads(run.recipe.threads)
        dataset = _load(run.recipe.data)
        run.check_unchanged(preset, dataset)
        recipe = run.recipe
        ref = export_checkpoint(
            preset,
            dataset,
            run.checkpoint,
            name=recipe.name,
            store=recipe.store,
            seed=recipe.seed,
            default_for=recipe.default_for,
        )
        _show_written(ref, recipe.store)


@app.command("models")
def models_command(
    store: StoreOption = Path("models_store"),
    data_root: DataRootOption = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="One of them; may be given again.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train every artifact that the project ships, each as its name's next version: 20 minutes on a free core."""
    with _one_line_errors():
        names = [model.name for model in SHIPPED_MODELS]
        if unknown := [name for name in only or [] if name not in names]:
            raise TrainingError(f"only: expected one of {', '.join(names)}; found {unknown[0]!r}")
        chosen = choose_device(device)
        for model in SHIPPED_MODELS:
            if only and model.name not in only:
                continue
            _use_threads(model.threads)
            dataset = _load(_choice(model.data, data_root))
            with _shown(quiet=False) as progress:
                ref = make_artifact(
                    get_preset(model.preset),
                    dataset,
                    name=model.name,
                    store=store,
                    seed=model.seed,
                    device=chosen,
                    progress=progress,
                    default_for=model.default_for,
                    say=_say,
                )
            _show_figures(ref)


@app.command("list")
def list_command() -> None:
    """Show every preset: what it is for, what its artifacts can do, where it comes from, what to expect of it."""
    for preset in PRESETS.values():
        console.print(f"[bold]{preset.name}[/bold]: {preset.purpose}", highlight=False)
        about = Table.grid(padding=(0, 1), pad_edge=True)  # a line for each: columns of six would be too narrow
        about.add_row("  takes", ", ".join(preset.takes))
        about.add_row("  can", ", ".join(preset.capabilities))
        about.add_row("  source", preset.source)
        about.add_row("  expected", preset.expected)
        console.print(about, highlight=False)
    console.print("Expected: on MNIST's test pictures, at the preset's own settings where no others are named.")
    console.print("python -m training train PRESET --data digits --name NAME", highlight=False, soft_wrap=True)


@app.command("data")
def data_command(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    data_root: DataRootOption = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    label_column: LabelColumnOption = None,
    on_bad: OnBadOption = OnBad.SKIP,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split.")] = 0,
) -> None:
    """Look at data before training: shape, classes, parts, hashes, and what is wrong with it."""
    with _one_line_errors():
        dataset = _load(_choice(data, data_root, image_size, channels, label_column, on_bad))
        split = split_dataset(dataset, seed)
        table = Table(title=dataset.name, show_header=False)
        kind = "pictures" if dataset.picture is not None else "records"
        table.add_row("items", f"{len(dataset.items):,} {kind} of {' × '.join(map(str, dataset.item_shape))}")
        if dataset.features is not None:
            table.add_row("features", ", ".join(dataset.features[:20]) + (" …" if len(dataset.features) > 20 else ""))
        if dataset.labels is not None:
            counts = torch.bincount(dataset.labels, minlength=len(dataset.label_names)).tolist()
            pairs = zip(dataset.label_names[:20], counts, strict=False)
            table.add_row("classes", ", ".join(f"{label}: {count}" for label, count in pairs))
        table.add_row("parts", ", ".join(f"{part}: {count:,}" for part, count in split.counts.items()))
        table.add_row("SHA-256", dataset.sha256)
        table.add_row("split's SHA-256", split.sha256)
        table.add_row("presets", ", ".join(p.name for p in PRESETS.values() if kind in p.takes))
        console.print(table)


@app.command("surfaces")
def surfaces_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to write good/, defective/ and masks/ to.")],
    good: Annotated[int, typer.Option("--good", min=0, help="How many good ones.")] = 200,
    defective: Annotated[int, typer.Option("--defective", min=0, help="How many with a defect.")] = 40,
    side: Annotated[int, typer.Option("--side", min=32, max=1024, help="Height and width in pixels.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides everything.")] = 0,
) -> None:
    """Draw textured surfaces, good and defective ones, to try inspection where no real pictures are at hand.

    Then: `python -m training train inspection --data FOLDER/good --name surface`
    """
    with _one_line_errors():
        write_surfaces(out, good, defective, side, seed)
        _say(f"{good} good and {defective} defective surfaces of {side} × {side} pixels in {out}")


@app.command("inspect")
def inspect_command(artifact: ArtifactArgument, store: StoreOption = Path("models_store")) -> None:
    """Show what an artifact says about itself: capabilities, reasons for those it lacks, figures, origin."""
    with _one_line_errors():
        manifest = open_artifact(artifact, store).manifest
        table = Table(title=f"{manifest.name}:{manifest.version}", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("description", manifest.description)
        table.add_row("input", f"{' × '.join(map(str, manifest.input.shape))}, range {manifest.input.range}")
        table.add_row("latent_dim", str(manifest.latent_dim))
        table.add_row("can", ", ".join(manifest.capabilities))
        for capability, reason in manifest.unsupported.items():
            table.add_row(f"cannot {capability}", reason)
        if manifest.labels is not None:
            table.add_row("classes to sample", ", ".join(manifest.labels))
        if manifest.calibration is not None:
            table.add_row("calibration", f"{manifest.calibration.count} scores, {manifest.calibration.source}")
        origin = manifest.training
        table.add_row("trained", f"{origin.preset} on {origin.data.name}, seed {origin.seed}, {origin.epochs} epochs")
        table.add_row("on", f"{origin.device}, {origin.threads} threads, {origin.wall_time_s:.0f} s")
        table.add_row("parameters", f"{origin.parameters:,}")
        for file, entry in manifest.files.items():
            table.add_row(file, f"{entry.bytes:,} bytes, SHA-256 {entry.sha256}")
        console.print(table)
        _show_metrics("Figures", manifest.metrics)


@app.command("verify")
def verify_command(artifact: ArtifactArgument, store: StoreOption = Path("models_store")) -> None:
    """Check an artifact's hashes, and run its self-test on this machine. Exit code 1 if it fails."""
    with _one_line_errors(exit_code=1):
        opened = open_artifact(artifact, store)
        table = Table(title=f"{opened.ref}: self-test")
        for heading in ("method", "largest difference", "verdict"):
            table.add_column(heading)
        differences = verify_artifact(opened)
        for difference in differences:
            verdict = "passed" if difference.within_tolerance else "FAILED"
            table.add_row(difference.capability, f"{difference.largest:.2g}", verdict)
        console.print(table)
        if not all(difference.within_tolerance for difference in differences):
            raise TrainingError(f"{opened.ref}: this machine computes other answers than the artifact promises")


@app.command("evaluate")
def evaluate_command(
    artifact: ArtifactArgument,
    data: DataOption,
    store: StoreOption = Path("models_store"),
    data_root: DataRootOption = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    label_column: LabelColumnOption = None,
) -> None:
    """Measure an artifact's test figures anew, beside those in its manifest."""
    with _one_line_errors():
        opened = open_artifact(artifact, store)
        dataset = _load_for(opened, data, data_root, image_size, channels, label_column)
        metrics, same_split = evaluate_artifact(opened, dataset)
        _show_metrics(f"{opened.ref} on {dataset.name}", metrics, opened.manifest.metrics)
        if not same_split:
            console.print("Not the data that it was made from: its manifest has another split hash.")


@app.command("calibrate")
def calibrate_command(
    artifact: ArtifactArgument,
    data: DataOption,
    store: StoreOption = Path("models_store"),
    data_root: DataRootOption = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    label_column: LabelColumnOption = None,
    labelled: Annotated[
        str | None,
        typer.Option("--labelled", help="Data with classes, one of them normal: figures, and weights of the parts."),
    ] = None,
    normal: Annotated[
        str | None, typer.Option("--normal", help="The normal class of --labelled. Default: good, normal or ok.")
    ] = None,
) -> None:
    """Write the artifact's next version with a threshold measured on these normal items; the model stays as it is.

    They must be normal, and neither items that it was trained on nor items that it will be judged on. With --labelled,
    half of those items choose how much each part of the score weighs, if that gains anything, and the others say how
    well the score tells anomalies and what each false-positive rate lets slip.
    """
    with _one_line_errors():
        opened = open_artifact(artifact, store)
        dataset = _load_for(opened, data, data_root, image_size, channels, label_column)
        known = None
        if labelled is not None:
            of_classes = _load_for(opened, labelled, data_root, image_size, channels, label_column)
            known = labelled_items(of_classes, normal, opened.manifest.training.seed)
        ref, judged = recalibrate(opened, dataset, f"{dataset.name}, {len(dataset.items)} items", known)
        manifest = read_artifact(ref).manifest
        if judged is not None:
            _show_judged(judged, manifest)
        if manifest.calibration is not None:
            _say(f"{ref}: {manifest.calibration.count} scores, {manifest.calibration.id}; model.pt as in {opened.ref}")
        _show_written(ref, store)


def _show_judged(judged: Judged, manifest: Manifest) -> None:
    table = Table(title=f"{judged.anomalies} anomalies and {judged.normals} normal items that chose no weights")
    for heading in ("target_fpr", "overkill: normal items flagged", "escape: anomalies not flagged"):
        table.add_column(heading)
    for trade in judged.trades:
        table.add_row(f"{trade.target_fpr:g}", f"{trade.overkill:.1%}", f"{trade.escape:.1%}")
    console.print(table)
    _say(f"AUROC {judged.auroc:.4f}, average precision {judged.average_precision:.4f}, best F1 {judged.best_f1:.4f}")
    if manifest.fusion is None:
        _say("Weights of the parts: as before, since others hardly gain")
    else:
        pairs = zip(manifest.components, manifest.fusion.weights, strict=True)
        _say(f"Weights of the parts, learnt: {', '.join(f'{name} {weight:g}' for name, weight in pairs)}")


@app.command("finetune")
def finetune_command(
    artifact: ArtifactArgument,
    data: DataOption,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the classifier goes. Default: classifiers/NAME.")
    ] = None,
    hidden_size: Annotated[
        int, typer.Option("--hidden-size", min=0, help="Of the head's hidden layer; 0: a linear head.")
    ] = 0,
    labels_per_class: Annotated[
        int | None, typer.Option("--labels-per-class", min=1, help="Use only so many labelled items. Default: all.")
    ] = None,
    store: StoreOption = Path("models_store"),
    data_root: DataRootOption = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    label_column: LabelColumnOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train a small classifier on an artifact's latent vectors, from labelled items; the artifact stays as it is.

    It is written as a TorchScript file, from items to class probabilities, with its labels and figures beside it.
    """
    with _one_line_errors():
        _use_threads(threads)
        opened = open_artifact(artifact, store)
        dataset = _load_for(opened, data, data_root, image_size, channels, label_column)
        classifier = finetune(opened, dataset, hidden_size=hidden_size, labels_per_class=labels_per_class)
        folder = out or CLASSIFIERS / opened.ref.name
        write_classifier(folder, classifier, opened, dataset)
        table = Table(title=f"Test accuracy, {classifier.labelled:,} labelled items of {dataset.name}")
        for heading in ("the same head on", "accuracy"):
            table.add_column(heading)
        table.add_row(f"{opened.manifest.latent_dim} latent numbers of {opened.ref}", f"{classifier.accuracy:.4f}")
        for words, value in classifier.baselines.items():
            table.add_row(words, f"{value:.4f}")
        console.print(table)
        _say(f'Written: {folder / CLASSIFIER_FILE}; in Python, torch.jit.load("{folder / CLASSIFIER_FILE}")(items)')


@app.command("report")
def report_command(folder: RunArgument) -> None:
    """Write a finished run's page, one HTML file with all its pictures in it; every run ends with one anyway."""
    with _one_line_errors():
        run = Run.open(folder)
        if run.recipe.artifact is None:
            raise TrainingError(f"run {folder}: expected a finished run; `python -m training resume {folder}` ends it")
        _write_report(run, open_artifact(run.recipe.artifact, run.recipe.store), _load(run.recipe.data, shown=False))


@app.command("compare")
def compare_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs.")],
) -> None:
    """Put runs side by side: settings in which they differ, and how far each came."""
    with _one_line_errors():
        runs = [Run.open(folder) for folder in folders]
        table = Table(title="Runs")
        table.add_column("", no_wrap=True)
        for run in runs:
            table.add_column(run.folder.name, overflow="fold")
        configs = [_flat(run.recipe.config) for run in runs]
        facts: dict[str, list[str]] = {
            "preset": [run.recipe.preset for run in runs],
            "data": [run.recipe.data.name for run in runs],
            "seed": [str(run.recipe.seed) for run in runs],
        }
        for key in dict.fromkeys(key for config in configs for key in config):
            values = [str(config.get(key, "–")) for config in configs]
            if len(set(values)) > 1:
                facts[key] = values
        lasts = [epochs[-1] if (epochs := run.epochs()) else {} for run in runs]
        for key, label in (("number", "epochs"), ("loss", "loss"), ("validation_mse", "validation MSE")):
            facts[label] = [f"{last[key]:.5g}" if key in last else "–" for last in lasts]
        artifacts = [_artifact_of(run) for run in runs]
        names = dict.fromkeys(name for artifact in artifacts if artifact for name in artifact.manifest.metrics)
        for name in names:
            facts[name] = [
                f"{artifact.manifest.metrics[name].value:.5g}"
                if artifact is not None and name in artifact.manifest.metrics
                else "–"
                for artifact in artifacts
            ]
        facts["artifact"] = [run.recipe.artifact or "unfinished" for run in runs]
        for label, values in facts.items():
            table.add_row(label, *values)
        console.print(table)


def _train(
    run: Run,
    preset: Preset,
    dataset: Dataset,
    device: torch.device,
    processes: Processes,
    *,
    tensorboard: bool,
    quiet: bool,
) -> None:
    """Trains a run to its end, or to a signal's, and shows how it goes."""
    recipe = run.recipe
    with stop_signals() as interruption, _shown(quiet=quiet or not processes.writes) as progress:
        try:
            ref = make_artifact(
                preset,
                dataset,
                name=recipe.name,
                store=recipe.store,
                seed=recipe.seed,
                device=device,
                progress=run.progress(progress, tensorboard=tensorboard),
                default_for=recipe.default_for,
                say=_say if processes.writes and not quiet else lambda _: None,
                checkpoints=run.checkpoint,
                max_minutes=recipe.max_minutes,
                stop=interruption.is_asked,
                processes=processes,
            )
        except Interrupted as error:
            raise _Stopped(interruption, run) from error
    if ref is None:
        return
    run.save(artifact=str(ref))
    _write_report(run, read_artifact(ref), dataset)
    if not quiet:
        _show_figures(ref)
    _show_written(ref, recipe.store)


def _write_report(run: Run, artifact: Artifact, dataset: Dataset) -> None:
    path = run.folder / REPORT_FILE
    path.write_text(report(artifact, dataset, run.epochs()))
    _say(f"Report: {path}")


@dataclass
class _Stopped(Exception):  # named for what happened
    interruption: Interruption
    run: Run


def _artifact_of(run: Run) -> Artifact | None:
    try:
        return None if run.recipe.artifact is None else open_artifact(run.recipe.artifact, run.recipe.store)
    except TrainingError:
        return None  # removed since


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, fields in config.items() for key, value in fields.items()}


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Progress]:
    """Whatever shows progress best here."""
    if quiet:
        yield Silent()
    elif console.is_terminal:
        with Bar(console) as bar:
            yield bar
    else:
        yield Lines(console)


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _choice(
    data: str,
    data_root: Path | None,
    image_size: str | None = None,
    channels: int | None = None,
    label_column: str | None = None,
    on_bad: OnBad = OnBad.SKIP,
) -> DataChoice:
    if channels not in (None, 1, 3):
        raise TrainingError(f"channels: expected 1 or 3, found {channels}")
    return DataChoice(
        name=data,
        root=data_root or default_data_root(),
        image_size_px=_parse_size(image_size),
        channels=channels,
        label_column=label_column,
        on_bad=on_bad.value,
    )


def _load_for(
    artifact: Artifact,
    data: str,
    data_root: Path | None,
    image_size: str | None,
    channels: int | None,
    label_column: str | None,
) -> Dataset:
    """Data for an artifact: a folder's pictures are brought to its input unless the caller says otherwise."""
    shape = artifact.manifest.input.shape
    if len(shape) == 3 and Path(data).expanduser().is_dir():
        image_size = image_size or f"{shape[1]}x{shape[2]}"
        channels = channels or shape[0]
    return _load(_choice(data, data_root, image_size, channels, label_column))


def _load(choice: DataChoice, *, shown: bool = True) -> Dataset:
    dataset = choice.load()
    if not shown:
        return dataset
    if dataset.skipped:
        errors.print(f"skipped {len(dataset.skipped)} that cannot be used:", highlight=False)
        for line in dataset.skipped[:SHOWN_SKIPPED]:
            errors.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        if len(dataset.skipped) > SHOWN_SKIPPED:
            errors.print(f"  and {len(dataset.skipped) - SHOWN_SKIPPED} more", highlight=False)
    for remark in dataset.remarks:
        errors.print(f"note: {remark}", highlight=False, markup=False, soft_wrap=True)
    return dataset


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and 0 < int(side) <= 4096 for side in sides):
        raise TrainingError(f"image-size: expected HEIGHTxWIDTH or one number, 1 to 4096 pixels, found {text!r}")
    return int(sides[0]), int(sides[-1])


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrainingError(f"name: expected a-z, 0-9 and, after the first, also . _ -, found {name!r}")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _show_rehearsal(
    preset: Preset, dataset: Dataset, seed: int, device: torch.device, max_minutes: float | None
) -> None:
    rehearsal = rehearse(preset, dataset, seed, device)
    table = Table(title=f"{preset.name} on {dataset.name}", show_header=False)
    table.add_row("parameters", f"{rehearsal.parameters:,}")
    table.add_row("memory", f"about {rehearsal.memory_bytes / 1e6:,.0f} MB beside torch itself")
    table.add_row(
        "steps", f"{rehearsal.steps:,} of {preset.optimisation.batch_size} items, {rehearsal.step_s:.2g} s each"
    )
    minutes = rehearsal.minutes if max_minutes is None else min(max_minutes, rehearsal.minutes)
    table.add_row("estimated time", f"{minutes:.2g} minutes on {device}, {torch.get_num_threads()} threads")
    for section, fields in preset.config.items():
        table.add_row(section, ", ".join(f"{key}={value}" for key, value in fields.items()) or "–")
    console.print(table)
    console.print("Nothing was trained or written.")


def _show_figures(ref: ArtifactRef | None) -> None:
    if ref is not None:
        manifest = read_artifact(ref).manifest
        _show_metrics(f"{ref}, {manifest.training.wall_time_s:.0f} s of training", manifest.metrics)


def _show_metrics(title: str, metrics: dict[str, Metric], promised: dict[str, Metric] | None = None) -> None:
    """Figures beside their baselines, then how each was measured: too much for a column."""
    table = Table(title=title)
    for heading in ("figure", "value", *(["manifest"] if promised is not None else []), "beside"):
        table.add_column(heading, overflow="fold")
    for name, metric in metrics.items():
        beside = ", ".join(f"{what} {value:.5g}" for what, value in metric.baselines.items())
        before = [] if promised is None else [f"{promised[name].value:.5g}" if name in promised else "–"]
        table.add_row(name, f"{metric.value:.5g}", *before, beside)
    console.print(table)
    for name, metric in metrics.items():
        console.print(f"{name}: {metric.unit}; {metric.protocol}", highlight=False, markup=False, style="dim")


def _show_written(ref: ArtifactRef, store: Path) -> None:
    manifest = read_artifact(ref).manifest
    lines = [
        f"Written to {ref.path}, verified. Serve it (a running service finds it by itself):",
        f"  HOURGLASS_MODELS_STORE={store} python -m app serve",
    ]
    if manifest.input.picture is not None:
        route = next((c for c in (Capability.RECONSTRUCT, Capability.DENOISE) if c in manifest.capabilities), None)
        if route is not None:
            lines.append(f"  curl -F image=@examples/digit-7.png 'http://127.0.0.1:8000/{route}?model={ref.name}'")
    else:
        row = ", ".join("0" for _ in range(manifest.input.size))
        lines.append(f"  curl 'http://127.0.0.1:8000/anomaly-score?model={ref.name}' -d '{{\"instances\": [[{row}]]}}'")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _one_line_errors(exit_code: int = 2) -> Iterator[None]:
    """Turns an error that the user can do something about into one line on stderr."""
    try:
        yield
    except TrainingError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(exit_code) from error
    except _Stopped as stopped:
        errors.print(
            f"{stopped.interruption.name}: checkpoint written; go on with "
            f"`python -m training resume {stopped.run.folder}`",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(stopped.interruption.exit_code) from None
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was written", highlight=False)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
