"""A run's folder: what was asked for, how far it is, how it went; enough to resume, export and report."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from app.artifacts.manifest import Capability
from training.checkpoints import CheckpointFile
from training.data import Dataset, load_dataset
from training.errors import TrainingError
from training.loop import Epoch, Progress
from training.presets import Preset, get_preset, override

RECIPE_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
REPORT_FILE = "report.html"


class DataChoice(BaseModel):
    """Which data, and how it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    root: Path
    image_size_px: tuple[int, int] | None = None
    channels: int | None = None
    label_column: str | None = None
    on_bad: Literal["skip", "fail"] = "skip"

    def load(self) -> Dataset:
        """The data set. Raises TrainingError."""
        return load_dataset(
            self.name,
            self.root,
            image_size_px=self.image_size_px,
            channels=self.channels,
            label_column=self.label_column,
            on_bad=self.on_bad,
        )


class Recipe(BaseModel):
    """All that decides an artifact, beside the code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    settings: tuple[str, ...] = ()
    config: dict[str, Any] = {}  # as resolved, to notice when the code's presets have changed
    data: DataChoice
    data_sha256: str = ""
    name: str
    store: Path
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    max_minutes: float | None = None
    default_for: tuple[Capability, ...] = ()
    artifact: str | None = None  # name:version, once it is written

    def resolve(self) -> Preset:
        """The preset with its settings. Raises TrainingError."""
        return override(get_preset(self.preset), self.settings)


class Run:
    """A folder with a recipe, a checkpoint and a log of metrics."""

    def __init__(self, folder: Path, recipe: Recipe, *, writes: bool = True) -> None:
        self.folder, self.recipe, self._writes = folder, recipe, writes

    def __repr__(self) -> str:
        return f"Run({self.folder})"

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, *, writes: bool = True) -> Run:
        """A new run. Raises TrainingError if there is one already, or the folder cannot be made."""
        if writes:
            if (folder / RECIPE_FILE).exists():
                raise TrainingError(
                    f"run {folder}: there is one already; go on with `python -m training resume {folder}`, or name "
                    "another folder with --run-dir"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(f"run {folder}: expected a folder to write to: {error.strerror}") from error
        run = cls(folder, recipe, writes=writes)
        run.save()
        return run

    @classmethod
    def open(cls, folder: Path, *, writes: bool = True) -> Run:
        """A run that was begun before. Raises TrainingError."""
        try:
            text = (folder / RECIPE_FILE).read_text()
            return cls(folder, Recipe.model_validate_json(text), writes=writes)
        except OSError as error:
            raise TrainingError(
                f"run {folder}: expected a folder with {RECIPE_FILE}, found none: {error.strerror}"
            ) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise TrainingError(f"run {folder}: {RECIPE_FILE}: {first['loc']}: {first['msg']}") from error

    @property
    def checkpoint(self) -> CheckpointFile:
        """Where its state is kept."""
        return CheckpointFile(self.folder / CHECKPOINT_FILE, writes=self._writes)

    def save(self, **changes: Any) -> None:
        """Writes the recipe, with these fields changed."""
        self.recipe = self.recipe.model_copy(update=changes)
        if self._writes:
            temporary = self.folder / f".{RECIPE_FILE}"
            temporary.write_text(self.recipe.model_dump_json(indent=2) + "\n")
            temporary.replace(self.folder / RECIPE_FILE)

    def check_unchanged(self, preset: Preset, dataset: Dataset) -> None:
        """Raises TrainingError if the run cannot be gone on with as it was begun."""
        if json.loads(json.dumps(preset.config)) != self.recipe.config:
            raise TrainingError(
                f"run {self.folder}: preset {preset.name} has other settings now than when it was begun"
            )
        if dataset.sha256 != self.recipe.data_sha256:
            raise TrainingError(f"run {self.folder}: data {dataset.name} has changed since the run was begun")

    def epochs(self) -> list[dict[str, Any]]:
        """The log's lines, one per epoch."""
        path = self.folder / METRICS_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def progress(self, shown: Progress, *, tensorboard: bool = False) -> Progress:
        """A progress that logs every epoch here, and to TensorBoard if asked, beside what `shown` does."""
        if not self._writes:
            return shown
        return _Log(self.folder, shown, tensorboard=tensorboard)


class _Log:
    """Writes one JSON line per epoch."""

    def __init__(self, folder: Path, shown: Progress, *, tensorboard: bool) -> None:
        self._path, self._shown, self._writer = folder / METRICS_FILE, shown, None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
            except ImportError as error:
                raise TrainingError("tensorboard: pip install 'hourglass-autoencoders[tensorboard]'") from error
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def begin(self, images: int, epochs: int, seen: int = 0) -> None:
        """Forgets epochs that the training will go through once more."""
        done = seen // images
        lines = self._path.read_text().splitlines()[:done] if self._path.exists() else []
        self._path.write_text("".join(f"{line}\n" for line in lines))
        self._shown.begin(images, epochs, seen)

    def step(self, images: int, loss: float | None) -> None:
        """Nothing of its own."""
        self._shown.step(images, loss)

    def epoch(self, epoch: Epoch) -> None:
        """Appends the epoch's line."""
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(epoch)) + "\n")
        if self._writer is not None:
            for name, value in asdict(epoch).items():
                if name != "number":
                    self._writer.add_scalar(name, value, epoch.number)
            self._writer.flush()
        self._shown.epoch(epoch)


def new_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or with the next free number behind it."""
    if not (parent / name).exists():
        return parent / name
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    taken = [int(match[1]) for path in parent.iterdir() if (match := pattern.fullmatch(path.name))]
    return parent / f"{name}-{max(taken, default=1) + 1}"


def settings_of_toml(path: Path) -> list[str]:
    """A TOML file's tables as settings: `[optimisation] epochs = 5` is `optimisation.epochs=5`.

    Raises TrainingError.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"config {path}: {error}") from error
    settings: list[str] = []
    for section, fields in tables.items():
        if not isinstance(fields, dict):
            raise TrainingError(f"config {path}: expected tables such as [optimisation], found the key {section!r}")
        settings += [f"{section}.{field}={json.dumps(value)}" for field, value in fields.items()]
    return settings
