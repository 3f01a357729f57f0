"""What the worker processes of one service know of each other: a snapshot of each, in a folder that they share.

Whatever a process answers about the service is about all of them. Knows files and process ids; no HTTP, no models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from app.artifacts.drift import Drift, measure_drift

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
STALE_AFTER_S = 2.0
_PAGE_BYTES, _CLOCK_TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class VersionState(BaseModel):
    """Where one version of a model stands."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int
    state: str
    reason: str | None = None


class PValues(BaseModel):
    """Recent p-values of one version, counted by bin, and how many scores its calibration has."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int
    counts: tuple[int, ...]
    calibrated: int


class Snapshot(BaseModel):
    """What one worker process says of itself."""

    model_config = ConfigDict(frozen=True)

    reasons_not_ready: tuple[str, ...]
    is_loaded: bool
    versions: tuple[VersionState, ...]
    waiting_rows: int
    is_draining: bool = False
    model_bytes: int = 0
    p_values: tuple[PValues, ...] = ()
    pid: int = 0

    @property
    def cpu_s(self) -> float:
        """Processor seconds that the worker has used; 0 once it is gone."""
        fields = _of_process(self.pid, "stat").rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / _CLOCK_TICKS  # user and system

    @property
    def resident_bytes(self) -> int:
        """The worker's memory; 0 once it is gone."""
        fields = _of_process(self.pid, "statm").split()
        return int(fields[1]) * _PAGE_BYTES if fields else 0


# In the order of how much they say about the whole: one worker that refused a version speaks for all.
_STATES = ("refused", "loading", "unloaded", "ready")


@dataclass(frozen=True)
class Member:
    """A worker's place among the others."""

    index: int
    count: int
    folder: Path

    def snapshot_path(self, index: int) -> Path:
        """Where the worker of that index writes its snapshot."""
        return self.folder / f"worker-{index}.json"

    def socket_name(self, index: int) -> str:
        """File name, in the folder, of the socket on which the worker of that index takes orders."""
        return f"worker-{index}.sock"


class Fleet:
    """All workers as one of them sees them. Open and close it with `async with`: meanwhile it writes its heartbeat.

    Args:
        describe: this worker's own snapshot, now.
        member: its place among the others; None if it is the only one.
    """

    def __init__(self, describe: Callable[[], Snapshot], member: Member | None = None) -> None:
        self._describe = describe
        self._member = member
        self._parent = os.getppid()
        self._beating: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Fleet {self._member or 'of one'}>"

    async def __aenter__(self) -> Self:
        if self._member is not None:
            self._beating = asyncio.create_task(self._beat(self._member), name="heartbeat")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beating is not None and self._member is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
            self._member.snapshot_path(self._member.index).unlink(missing_ok=True)

    def snapshots(self) -> list[Snapshot | None]:
        """Each worker's latest snapshot, by index; None for one that is not there or has stopped beating."""
        own = self._own()
        if self._member is None:
            return [own]
        member = self._member
        return [own if index == member.index else _read(member.snapshot_path(index)) for index in range(member.count)]

    def reasons_not_ready(self) -> list[str]:
        """Why the service is not ready; empty when every worker is."""
        snapshots = self.snapshots()
        reasons: dict[str, None] = {}
        for index, snapshot in enumerate(snapshots):
            if snapshot is None:
                reasons[f"worker {index} does not answer"] = None
            else:
                reasons |= dict.fromkeys(snapshot.reasons_not_ready)
        return list(reasons)

    @property
    def is_draining(self) -> bool:
        """Whether any worker is on its way out."""
        return any(snapshot is not None and snapshot.is_draining for snapshot in self.snapshots())

    @property
    def is_loaded(self) -> bool:
        """Whether every worker has loaded or refused every artifact."""
        return all(snapshot is not None and snapshot.is_loaded for snapshot in self.snapshots())

    @property
    def waiting_rows(self) -> int:
        """Rows that wait in all workers."""
        return sum(snapshot.waiting_rows for snapshot in self.snapshots() if snapshot is not None)

    def versions(self) -> dict[tuple[str, int], VersionState]:
        """Each version's state over all workers: ready only where it is ready everywhere."""
        merged: dict[tuple[str, int], VersionState] = {}
        for snapshot in self.snapshots():
            for found in snapshot.versions if snapshot is not None else ():
                key = (found.name, found.version)
                if key not in merged or _STATES.index(found.state) < _STATES.index(merged[key].state):
                    merged[key] = found
        return merged

    def drifts(self) -> dict[tuple[str, int], Drift]:
        """How far each version's recent p-values are from those of normal items, over all workers."""
        found: dict[tuple[str, int], list[PValues]] = {}
        for snapshot in self.snapshots():
            for sketch in snapshot.p_values if snapshot is not None else ():
                found.setdefault((sketch.name, sketch.version), []).append(sketch)
        measured = {
            key: measure_drift([sketch.counts for sketch in sketches], sketches[0].calibrated)
            for key, sketches in found.items()
        }
        return {key: drift for key, drift in measured.items() if drift is not None}

    def _own(self) -> Snapshot:
        return self._describe().model_copy(update={"pid": os.getpid()})

    async def _beat(self, member: Member) -> None:
        """Writes what has changed; that nothing has, the file's time of change tells, at a fraction of the cost."""
        path = member.snapshot_path(member.index)
        temporary = path.with_suffix(".writing")
        written = ""
        while True:
            text = self._own().model_dump_json()
            if text != written:
                temporary.write_text(text)
                temporary.rename(path)
                written = text
            now = time.monotonic_ns()  # of the machine: all its processes share this clock
            os.utime(path, ns=(now, now))
            if os.getppid() != self._parent:
                logger.error("the supervisor is gone; stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            await asyncio.sleep(HEARTBEAT_S)


def _read(path: Path) -> Snapshot | None:
    try:
        snapshot = Snapshot.model_validate_json(path.read_bytes())
        beaten_at_s = path.stat().st_mtime_ns / 1e9
    except (OSError, ValidationError):
        return None
    if time.monotonic() - beaten_at_s > STALE_AFTER_S:
        return None
    try:
        os.kill(snapshot.pid, 0)
    except ProcessLookupError:
        return None  # it died since its last heartbeat
    return snapshot


def _of_process(pid: int, name: str) -> str:
    """A file of /proc about a process; empty once it is gone, and where there is none."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
