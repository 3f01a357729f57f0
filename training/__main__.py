"""The command line: `python -m training …`. It parses, calls and prints; what it prints is computed elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from app.artifacts.manifest import NAME_PATTERN, Capability, Metric
from app.artifacts.store import ArtifactRef, read_artifact
from training.autoencoders import AUTOENCODERS
from training.data import TORCHVISION_SETS, Dataset, default_data_root, load_dataset
from training.errors import TrainingError
from training.models import SHIPPED_MODELS
from training.presets import PRESETS, Preset, get_preset, override
from training.progress import Bar, Lines
from training.run import choose_device, evaluate_artifact, make_artifact, open_artifact, verify_artifact

DATA_HELP = f"digits (offline), {', '.join(TORCHVISION_SETS)} (through torchvision), or a folder of pictures."
SHOWN_SKIPPED_FILES = 10

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
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; results depend on it. Default: torch's choice.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Changes a hyper-parameter; may be given again."),
    ] = None,
    default_for: Annotated[
        list[Capability] | None,
        typer.Option("--default-for", help="The service prefers this artifact for it; may be given again."),
    ] = None,
) -> None:
    """Train, calibrate, evaluate and export one artifact, and verify what was written.

    Examples:
    `python -m training train basic --data digits --name my-digits`

    `python -m training train conv --data photos/ --name my-photos --image-size 64 --epochs 20`

    `python -m training train vae --data fashion-mnist --name clothes --set latent_dim=8 --set learning_rate=5e-4`
    """
    with _one_line_errors():
        changes = list(settings or [])
        changes += [] if epochs is None else [f"optimisation.epochs={epochs}"]
        changes += [] if batch_size is None else [f"optimisation.batch_size={batch_size}"]
        preset = override(get_preset(preset_name), changes)
        _check_name(name)
        _use_threads(threads)
        chosen = choose_device(device)
        dataset = _load(data, data_root, image_size, channels)
        ref = _make(preset, dataset, name, store, seed, chosen, tuple(default_for or ()))
        _show_next_steps(ref, store)


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
            dataset = _load(model.data, data_root, None, None)
            _make(get_preset(model.preset), dataset, model.name, store, model.seed, chosen, model.default_for)


@app.command("list")
def list_command() -> None:
    """Show every preset: what it is for, what its artifacts can do, where it comes from, what to expect of it."""
    table = Table(title="Presets", caption="Figures: MNIST test pictures, the preset's own settings.")
    table.add_column("preset", no_wrap=True)
    for heading in ("for", "capabilities", "source", "expected"):
        table.add_column(heading, overflow="fold")
    for preset in PRESETS.values():
        capabilities = ", ".join(AUTOENCODERS[preset.architecture].capabilities)
        table.add_row(preset.name, preset.purpose, capabilities, preset.source, preset.expected)
    console.print(table)
    console.print("python -m training train PRESET --data digits --name NAME", highlight=False, soft_wrap=True)


@app.command("verify")
def verify_command(
    artifact: Annotated[str, typer.Argument(metavar="NAME[:VERSION]")], store: StoreOption = Path("models_store")
) -> None:
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
    artifact: Annotated[str, typer.Argument(metavar="NAME[:VERSION]")],
    data: DataOption,
    store: StoreOption = Path("models_store"),
    data_root: DataRootOption = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
) -> None:
    """Measure an artifact's test figures anew, beside those in its manifest."""
    with _one_line_errors():
        opened = open_artifact(artifact, store)
        dataset = _load(data, data_root, image_size, channels)
        metrics, same_split = evaluate_artifact(opened, dataset)
        _show_metrics(f"{opened.ref} on {dataset.name}", metrics, opened.manifest.metrics)
        if not same_split:
            console.print("Not the data that it was made from: its manifest has another split hash.")


def _make(
    preset: Preset,
    dataset: Dataset,
    name: str,
    store: Path,
    seed: int,
    device: torch.device,
    default_for: tuple[Capability, ...],
) -> ArtifactRef:
    """Trains with whatever shows progress best here, and prints the figures."""

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    def make(progress: Bar | Lines) -> ArtifactRef:
        return make_artifact(
            preset,
            dataset,
            name=name,
            store=store,
            seed=seed,
            device=device,
            progress=progress,
            default_for=default_for,
            say=say,
        )

    if console.is_terminal:
        with Bar(console) as bar:
            ref = make(bar)
    else:
        ref = make(Lines(console))
    manifest = read_artifact(ref).manifest
    _show_metrics(f"{ref}, {manifest.training.wall_time_s:.0f} s of training", manifest.metrics)
    return ref


def _load(data: str, data_root: Path | None, image_size: str | None, channels: int | None) -> Dataset:
    if channels not in (None, 1, 3):
        raise TrainingError(f"channels: expected 1 or 3, found {channels}")
    dataset = load_dataset(
        data, data_root or default_data_root(), image_size_px=_parse_size(image_size), channels=channels
    )
    if dataset.skipped:
        errors.print(f"skipped {len(dataset.skipped)} unreadable files:", highlight=False)
        for line in dataset.skipped[:SHOWN_SKIPPED_FILES]:
            errors.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        if len(dataset.skipped) > SHOWN_SKIPPED_FILES:
            errors.print(f"  and {len(dataset.skipped) - SHOWN_SKIPPED_FILES} more", highlight=False)
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


def _show_next_steps(ref: ArtifactRef, store: Path) -> None:
    lines = [
        f"Written to {ref.path}, verified. Serve it (a running service finds it after a restart):",
        f"  HOURGLASS_MODELS_STORE={store} python -m app serve",
        f"  curl -F image=@examples/digit-7.png 'http://127.0.0.1:8000/reconstruct?model={ref.name}'",
    ]
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
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was written", highlight=False)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
