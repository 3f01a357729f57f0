"""How far a training is, on a terminal as a bar, else as one line per epoch."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.loop import Epoch

REFRESHES_PER_S = 4  # a bar drawn at every step costs real time


class Silent:
    """Shows nothing."""

    def begin(self, images: int, epochs: int, seen: int = 0) -> None:
        """Nothing."""

    def step(self, images: int, loss: float | None) -> None:
        """Nothing."""

    def epoch(self, epoch: Epoch) -> None:
        """Nothing."""


class Lines:
    """One plain line per epoch, for logs."""

    def __init__(self, console: Console) -> None:
        self._console, self._epochs = console, 0

    def begin(self, images: int, epochs: int, seen: int = 0) -> None:
        """Remembers how many epochs there will be."""
        del images, seen
        self._epochs = epochs

    def step(self, images: int, loss: float | None) -> None:
        """Nothing: only epochs get a line."""

    def epoch(self, epoch: Epoch) -> None:
        """Prints the epoch's line."""
        self._console.print(_line(epoch, self._epochs), highlight=False)


class Bar:
    """A progress bar with loss, validation error, speed and time left. A context manager: it owns the live display."""

    def __init__(self, console: Console) -> None:
        self._epochs = 0
        self._seen = 0
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  validation MSE {task.fields[validation]}  {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=REFRESHES_PER_S,
        )
        self._task: TaskID = self._progress.add_task("", total=None, epoch="–", loss="–", validation="–", speed="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, images: int, epochs: int, seen: int = 0) -> None:
        """Draws the bar, empty or as full as the training was left."""
        self._epochs, self._seen = epochs, seen
        number = min(seen // images + 1, epochs)
        self._progress.update(self._task, total=epochs * images, completed=seen, epoch=f"{number}/{epochs}")

    def step(self, images: int, loss: float | None) -> None:
        """Counts the images; the display redraws itself at REFRESHES_PER_S."""
        self._seen += images
        if loss is not None:
            self._progress.update(self._task, completed=self._seen, loss=f"{loss:.5g}")

    def epoch(self, epoch: Epoch) -> None:
        """Shows the epoch's figures."""
        self._progress.update(
            self._task,
            completed=self._seen,
            epoch=f"{min(epoch.number + 1, self._epochs)}/{self._epochs}",
            validation=f"{epoch.validation_mse:.5f}",
            speed=f"{epoch.images_per_s:,.0f} items/s",
        )


def _line(epoch: Epoch, epochs: int) -> str:
    return (
        f"epoch {epoch.number}/{epochs}  loss {epoch.loss:.5g}  validation MSE {epoch.validation_mse:.5f}  "
        f"{epoch.images_per_s:,.0f} items/s"
    )
