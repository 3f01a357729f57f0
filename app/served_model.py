"""A model as requests see it: what it is, always; its module, while it is in memory. Knows the batcher and torch's
modules, no store and no names.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from app.artifacts.calibration import Calibration
from app.artifacts.drift import PValueSketch
from app.artifacts.manifest import Capability, Manifest
from app.artifacts.store import Artifact, Projection
from app.batching.batcher import Answered, Batcher
from app.batching.queue import Lane
from app.errors import DeadlineExceeded, QueueFull
from app.inference.loaded_model import LoadedModel, Row

_CANARY_PRIORITY = 10  # above any request's: where many wait, a dead model and a busy one must still be told apart
_CANARY_ROWS = 1
_MOST_REMEMBERED = 256

T = TypeVar("T")


@dataclass(eq=False)
class Pulse:
    """When a model last ran, on the machine's monotonic clock; 0 for never."""

    succeeded_at_s: float = 0.0
    has_failed: bool = False
    """Whether every row of its last batch failed."""


@dataclass(frozen=True)
class Replica:
    """A model on one device, and the batch size that is best for each of its methods there."""

    model: LoadedModel
    batch_sizes: dict[Capability, int]


@dataclass(eq=False)
class ModelLane(Lane[Row, Row]):
    """One capability of one model in memory; None as capability: its canaries, which are nobody's requests."""

    model: str = ""
    version: int = 0
    capability: Capability | None = None
    pulse: Pulse = field(default_factory=Pulse)


class ServedModel:
    """A sound model. Its module may leave memory, and comes back with the next request for it.

    Whoever holds one can run it, whatever becomes of it in the catalog meanwhile: what was in memory when it was
    dropped there stays until the last holder is done.

    Args:
        artifact: verified.
        batcher: what runs its rows.
        bring: puts its module into memory (`admit`); raises what a caller should be told.
    """

    def __init__(
        self, artifact: Artifact, batcher: Batcher, bring: Callable[[ServedModel], Coroutine[Any, Any, None]]
    ) -> None:
        self.manifest: Manifest = artifact.manifest
        self.calibration: Calibration | None = artifact.calibration()
        self.projection: Projection | None = artifact.projection()
        self.batcher = batcher
        self.name_header = str(self).encode()
        """Name and version as the header `X-Model` has them."""
        self.pulse = Pulse()
        self.p_values = PValueSketch()
        self.used_at_s = 0.0
        self.memory_bytes = 0
        """What its module takes in memory, or took when it was there last."""
        self._bring = bring
        self._bringing: asyncio.Task[None] | None = None
        self._lanes: dict[Capability, ModelLane] | None = None
        self._canary: ModelLane | None = None
        self._remembered: dict[tuple[Hashable, ...], Any] = {}

    def __str__(self) -> str:
        return f"{self.manifest.name}:{self.manifest.version}"

    def __repr__(self) -> str:
        return f"<ServedModel {self}, {'in memory' if self.in_memory else 'not in memory'}>"

    @property
    def in_memory(self) -> bool:
        """Whether its module is loaded."""
        return self._lanes is not None

    @property
    def lanes(self) -> dict[Capability, ModelLane]:
        """Its capabilities in the batcher; none while it is not in memory."""
        return self._lanes or {}

    def admit(self, replicas: Sequence[Replica]) -> None:
        """Takes its module into memory: one replica for each of the batcher's executors."""
        self._lanes = {capability: self._lane(replicas, capability) for capability in self.manifest.capabilities}
        self._canary = self._lane(replicas, next(iter(self.manifest.capabilities)), counts=False)
        self.pulse.succeeded_at_s = time.monotonic()  # the self-test just passed
        self.memory_bytes = sum(replica.model.memory_bytes for replica in replicas)

    def evict(self) -> None:
        """Gives its module's memory back, once what runs on it is done."""
        self._lanes = self._canary = None

    def run(
        self, capability: Capability, rows: Sequence[Row], *, timeout_s: float, caller: str, priority: int
    ) -> Coroutine[Any, Any, Answered[Row]]:
        """The outputs of the exported method for each row; takes and raises what `Batcher.submit` does.

        Also raises ModelUnavailable, if it had to come back into memory and could not.
        """
        self.used_at_s = time.monotonic()
        if self._lanes is None:
            return self._run_when_brought(capability, rows, timeout_s, caller, priority)
        # Held from here on: being evicted meanwhile does not matter.
        lane = self._lanes[capability]
        return self.batcher.submit(lane, rows, timeout_s=timeout_s, caller=caller, priority=priority)

    async def _run_when_brought(
        self, capability: Capability, rows: Sequence[Row], timeout_s: float, caller: str, priority: int
    ) -> Answered[Row]:
        left_s = await self._brought(timeout_s)
        return await self.run(capability, rows, timeout_s=left_s, caller=caller, priority=priority)

    def remembered(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """`make(self, *arguments)`, made once and kept as long as there is room: for what requests ask again and again
        and only the model and their parameters decide.
        """
        key = (make, *arguments)
        found: T | None = self._remembered.get(key)
        if found is None:
            found = make(self, *arguments)
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = found
        return found

    def check_room(self, capability: Capability, rows: int = 1) -> None:
        """Raises what `run` would raise at once for so many rows, such as QueueFull."""
        if self._lanes is not None:
            self.batcher.check_room(self._lanes[capability], rows)

    async def try_canary(self, timeout_s: float) -> None:
        """One forward through the queue like a request's, ahead of all. Raises what a request would see.

        A full queue or a module that is not in memory is no trouble, and nothing runs.
        """
        if self._canary is None:
            return
        low, high = self.manifest.input.range or (-1.0, 1.0)
        inputs = next(iter(self.manifest.capabilities.values())).inputs
        row = tuple(np.full(spec.shape, (low + high) / 2, np.float32) for spec in inputs)
        try:
            await self.batcher.submit(self._canary, [row], timeout_s=timeout_s, priority=_CANARY_PRIORITY)
        except QueueFull:
            return

    async def _brought(self, timeout_s: float) -> float:
        """Waits until it is in memory; returns what is left of the time. All who wait share one loading."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while self._lanes is None:  # it may be evicted again before its turn comes
                    if self._bringing is None:
                        self._bringing = asyncio.create_task(self._bring(self), name=f"bring {self}")
                        self._bringing.add_done_callback(self._brought_back)
                    await asyncio.shield(self._bringing)
        except TimeoutError as error:
            raise DeadlineExceeded(f"deadline: {self} was not in memory within {round(timeout_s * 1000)} ms") from error
        return max(1e-6, timeout_s - (time.monotonic() - started))

    def _brought_back(self, done: asyncio.Task[None]) -> None:
        self._bringing = None
        if not done.cancelled():
            done.exception()  # seen by whoever still waits; where nobody does, it is no news

    def _lane(self, replicas: Sequence[Replica], capability: Capability, *, counts: bool = True) -> ModelLane:
        inputs = self.manifest.capabilities[capability].inputs
        return ModelLane(
            name=f"{self} {capability if counts else 'canary'}",
            run=lambda rows, slot: replicas[slot].model.run(capability, rows),
            max_batch_size=min(replica.batch_sizes[capability] for replica in replicas) if counts else _CANARY_ROWS,
            row_bytes=sum(4 * math.prod(spec.shape) for spec in inputs),  # float32
            model=self.manifest.name,
            version=self.manifest.version,
            capability=capability if counts else None,
            pulse=self.pulse,
        )


def labels_of(lane: Lane[Any, Any]) -> tuple[str, int, Capability] | None:
    """Model, version and capability that a batch of that lane counts for; None for canaries."""
    if isinstance(lane, ModelLane) and lane.capability is not None:
        return lane.model, lane.version, lane.capability
    return None
