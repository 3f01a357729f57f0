"""How far a scoring is, and what came of it, for people."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from app.protocols.chunks import Summary
from app.scoring.run import Scored


class Bar:
    """A progress bar on a terminal, nothing elsewhere. A context manager: it owns the live display."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, counts="loading the model")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, read_bytes: int, total_bytes: int, summary: Summary) -> None:
        """Draws the bar as full as `read_bytes` of `total_bytes` are."""
        counts = f"{summary.items:,} items, {summary.anomalies:,} anomalies"
        if summary.failed:
            counts += f", {summary.failed:,} failed"
        self._progress.update(self._task, total=total_bytes, completed=read_bytes, counts=counts)


def summary_of(scored: Scored, out: Path | None) -> str:
    """One line."""
    summary, rate = scored.summary, scored.summary.items / max(scored.seconds, 1e-9)
    failed = f", {summary.failed:,} failed (see error)" if summary.failed else ""
    return (
        f"{summary.items:,} items by {scored.model}: {summary.ok:,} scored, {summary.anomalies:,} anomalies{failed}; "
        f"{scored.seconds:.1f} s, {rate:,.0f} items/s" + (f"; written to {out}" if out else "")
    )
