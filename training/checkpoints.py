"""A training's state on disk: written whole or not at all, so that it survives whatever ends the process."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from training.errors import TrainingError

SECONDS_BETWEEN = 60.0


class CheckpointFile:
    """One file that holds the last state. Only `writes` decides whether this process touches it."""

    def __init__(self, path: Path, *, every_s: float = SECONDS_BETWEEN, writes: bool = True) -> None:
        self._path, self._every_s, self._writes = path, every_s, writes
        self._last = time.monotonic()

    def __repr__(self) -> str:
        return f"CheckpointFile({self._path})"

    def load(self) -> dict[str, Any] | None:
        """The last state saved, None before the first. Raises TrainingError if the file is damaged."""
        if not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            raise TrainingError(f"checkpoint {self._path}: cannot be read: {str(error).splitlines()[0]}") from error
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the last state in one step: a process that dies here leaves one or the other."""
        self._last = time.monotonic()
        if not self._writes:
            return
        temporary = self._path.with_suffix(".writing")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def due(self) -> bool:
        """Whether the last save is `every_s` ago."""
        return time.monotonic() - self._last >= self._every_s
