"""Items ⇄ batches. Knows asyncio and executors; knows neither HTTP nor tensors."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self

from app.batching.deadlines import Deadlines
from app.batching.queue import FairQueue, Item, Lane, Result, Slice, Waiting
from app.errors import (
    DeadlineExceeded,
    DeviceLost,
    Draining,
    InferenceFailed,
    OutOfMemory,
    PayloadTooLarge,
    QueueFull,
    Unavailable,
)

logger = logging.getLogger(__name__)

Observe = Callable[[Lane[Any, Any], "BatchRecord"], None]

_TOGETHER_S = 0.002
"""For how long a batch may keep those of other lanes waiting that go to an executor together with it."""

_REST_S = 0.02
"""How long the event loop rests at most while there is no room."""

_LONGEST_DUE_S = 1.0
"""When a request is due at the latest that waits from now on, or a caller with much time would be put off until it has
little.
"""


@dataclass(slots=True)
class Answered(Generic[Result]):
    """A request's results in the order of its items, and where its time went, in seconds."""

    results: list[Result]
    queued_s: float
    ran_s: float


@dataclass(slots=True)
class BatchRecord:
    """One batch that ran: its rows, how long each of its requests had waited, and how long it ran, in seconds."""

    rows: int
    waits_s: Sequence[float]
    ran_s: float
    failed_rows: int


class _Request(Waiting[Item, Result]):
    """A caller's items, and the future that it awaits; `unanswered` items have no result yet."""

    __slots__ = ("answer", "enqueued_at", "queued_s", "results", "timeout_at", "unanswered")

    def __init__(
        self,
        lane: Lane[Item, Result],
        items: Sequence[Item],
        caller: str,
        priority: int,
        due: float,
        answer: asyncio.Future[Answered[Result]],
        enqueued_at: float,
        timeout_at: float,
    ) -> None:
        super().__init__(lane, items, caller, priority, due)
        self.answer = answer
        self.enqueued_at = enqueued_at
        self.timeout_at = timeout_at
        self.queued_s = 0.0  # until its first item left the queue
        self.results: list[Result | None] = [None] * self.waiting
        self.unanswered = self.waiting


@dataclass(slots=True)
class _Outcome:
    """What came of a batch: a result or an exception per row, when it ran, and the largest batch that fitted."""

    results: list[Any]
    started_at: float
    ended_at: float
    learnt_size: int | None


_Batch = list[Slice[_Request[Any, Any]]]


class Batcher:
    """Collects the items of many callers into batches and answers each caller with its own results.

    A batch leaves the moment an executor is free; while all are busy, items gather, up to the lane's `max_batch_size`.
    `FairQueue` says who is next. Items whose callers left or whose deadline passed leave the queue at once and never
    run. An executor's slot is given back by the executor alone, never by a waiter, and each request is resolved exactly
    once: with its results, or with the error of its first item that failed.

    Made on a running loop; opened and closed with `async with`: closing answers whoever still waits, and waits for
    what runs.

    Args:
        executors: one per device, each with exactly one thread; the caller's own.
        max_queue_rows, max_queue_bytes: most that may wait.
        observe: told of every batch.
        on_lost: told when an executor's device is lost.
    """

    def __init__(
        self,
        executors: Sequence[Executor],
        *,
        max_queue_rows: int,
        max_queue_bytes: int = 2**62,
        observe: Observe = lambda _lane, _record: None,
        on_lost: Callable[[DeviceLost], None] = lambda _error: None,
    ) -> None:
        self._executors = executors
        self._free = list(range(len(executors)))
        self._max_queue_rows = max_queue_rows
        self._max_queue_bytes = max_queue_bytes
        self._observe = observe
        self._on_lost = on_lost
        self._queue: FairQueue[_Request[Any, Any]] = FairQueue()
        self._dispatch_scheduled = False
        self._closed = False
        self._loop = asyncio.get_running_loop()  # asked for once: each time costs a call of the kernel
        self._lost: Unavailable | None = None
        self._running: dict[int, list[_Batch]] = {}  # by the executor's slot
        self._idle = asyncio.Event()
        self._idle.set()
        self._deadlines: Deadlines[_Request[Any, Any]] = Deadlines(self._expire)
        self._rests = False  # or is about to
        self._stays_awake = False
        self._has_ended = threading.Event()  # a batch, since the last one began
        self._rows_per_s = 0.0  # moving average while busy; 0 until the first batch ran

    def __repr__(self) -> str:
        running = len(self._executors) - len(self._free)
        state = "closed" if self._closed else f"running {running} batches" if running else "idle"
        return f"<Batcher {state}, {self._queue.rows} rows waiting>"

    @property
    def waiting_rows(self) -> int:
        """Rows that have not left the queue yet."""
        return self._queue.rows

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for request in list(self._queue):
            self._fail(request, Draining("the service is shutting down", retry_after_s=1))
        await self._idle.wait()
        self._deadlines.close()

    def give_up(self, error: Unavailable) -> None:
        """Answers everyone who waits, what runs included, with that error, and whoever comes from now on."""
        self._lost = error
        for request in list(self._queue):
            self._fail(request, error)
        for batches in list(self._running.values()):
            for part in itertools.chain.from_iterable(batches):
                self._fail(part.request, error)

    async def submit(
        self,
        lane: Lane[Item, Result],
        items: Sequence[Item],
        *,
        timeout_s: float | None = None,
        caller: str = "",
        priority: int = 0,
    ) -> Answered[Result]:
        """The results of `items`, in order.

        Args:
            lane: what runs them.
            items: at least one.
            timeout_s: seconds until the caller stops waiting, the time in the queue included.
            caller: whose they are; callers get equal shares.
            priority: higher goes first.

        Raises PayloadTooLarge, QueueFull and Draining before anything is enqueued; later DeadlineExceeded, and
        InferenceFailed naming the first item that failed.
        """
        self.check_room(lane, len(items))
        loop = self._loop
        now = loop.time()
        timeout_at = math.inf if timeout_s is None else now + timeout_s
        due = min(timeout_at, now + _LONGEST_DUE_S)
        request = _Request(lane, items, caller, priority, due, loop.create_future(), now, timeout_at)
        if timeout_s is not None:
            self._deadlines.add(request, timeout_at)
        self._queue.push(request)
        if self._free and not self._dispatch_scheduled:
            # Not at once: requests that arrived in the same turn of the loop belong in the same batch.
            self._dispatch_scheduled = True
            loop.call_soon(self._dispatch)
        try:
            return await request.answer
        finally:
            # Answered, failed, or the caller was cancelled: in each case nothing of it may stay behind.
            if timeout_s is not None:
                self._deadlines.discard(request)
            if request.waiting:
                self._queue.discard(request)

    def check_room(self, lane: Lane[Any, Any], rows: int = 1) -> None:
        """Raises what `submit` would raise at once: for whoever would do work for nothing before it comes to that."""
        if self._closed:
            raise Draining("the service is shutting down", retry_after_s=1)
        if self._lost is not None:
            raise self._lost
        if rows > self._max_queue_rows or rows * lane.row_bytes > self._max_queue_bytes:
            most = min(self._max_queue_rows, self._max_queue_bytes // max(1, lane.row_bytes))
            raise PayloadTooLarge(f"items: expected at most {most}, got {rows}")
        if not self._has_room(lane, rows):
            if not self._rests and not self._has_room(lane, 1):
                self._rests = True
                self._loop.call_soon(self._rest)
            raise QueueFull(
                f"queue: {self._queue.rows} rows of {self._queue.bytes} bytes wait, there is no room for {rows} more",
                retry_after_s=self._drain_time_s(),
            )

    def _has_room(self, lane: Lane[Any, Any], rows: int) -> bool:
        return (
            self._queue.rows + rows <= self._max_queue_rows
            and self._queue.bytes + rows * lane.row_bytes <= self._max_queue_bytes
        )

    def stay_awake(self) -> None:
        """Leaves the next rest out. Whoever sees a new connection calls it: an event loop takes one at each of its
        turns, so a crowd of them would wait for as many rests.
        """
        self._stays_awake = True

    def _rest(self) -> None:
        """Lets what arrives gather for a moment, or until a batch ends or a deadline passes: where all that comes is
        refused, each look at it takes the processor from what runs, and finds its caches cold.
        """
        self._rests = False
        if self._stays_awake:
            self._stays_awake = False
        elif not self._free:
            self._has_ended.wait(min(_REST_S, max(0.0, self._deadlines.due_at - self._loop.time())))

    def _drain_time_s(self) -> float:
        """How long the queue needs to empty at the measured rate, in seconds, from 1 to 60."""
        if not self._rows_per_s:
            return 1.0
        return min(60.0, max(1.0, math.ceil(self._queue.rows / self._rows_per_s)))

    def _dispatch(self) -> None:
        self._dispatch_scheduled = False
        while self._free and self._queue:
            self._start(self._take())

    def _take(self) -> list[_Batch]:
        """What goes to an executor next: a batch, and if all others are busy those of other lanes that are over soon,
        too. Handing work over costs more than running a small batch does.
        """
        batches = [self._queue.take()]
        lanes = [batches[0][0].request.lane]
        soon_s = lanes[0].batch_s
        while len(self._free) == 1 and self._queue:
            lane = self._queue.next_lane()
            soon_s += lane.batch_s
            if lane in lanes or soon_s > _TOGETHER_S:
                break
            lanes.append(lane)
            batches.append(self._queue.take())
        return batches

    def _start(self, batches: list[_Batch]) -> None:
        loop = self._loop
        now = loop.time()
        for batch in batches:
            for part in batch:
                if not part.start:
                    part.request.queued_s = now - part.request.enqueued_at
        slot = self._free.pop()
        self._has_ended.clear()
        try:
            running = self._executors[slot].submit(_run_batches, batches, slot)
        except RuntimeError as error:  # the executor was shut down under us: nobody may be left waiting
            self._free.append(slot)
            for batch in batches:
                self._deliver(batch, [error] * _rows(batch))
            return
        self._running[slot] = batches
        self._idle.clear()
        running.add_done_callback(lambda done: self._ended(slot, batches, done))

    def _ended(self, slot: int, batches: list[_Batch], done: Future[list[_Outcome]]) -> None:
        """Called on the executor's thread."""
        self._has_ended.set()
        self._loop.call_soon_threadsafe(self._finish, slot, batches, done)

    def _finish(self, slot: int, batches: list[_Batch], done: Future[list[_Outcome]]) -> None:
        """Hands each request its rows; runs on the event loop, and frees the executor's slot, whatever happened."""
        self._free.append(slot)
        del self._running[slot]
        try:
            outcomes = done.result()
        except BaseException as error:  # noqa: BLE001  the executor itself failed: everyone in the batches is told
            outcomes = [_Outcome([error] * _rows(batch), 0.0, 0.0, None) for batch in batches]
        now = self._loop.time()
        for batch in batches:
            for part in batch:
                if part.request.waiting:
                    self._queue.give_way(part.request, min(part.request.timeout_at, now + _LONGEST_DUE_S))
        self._dispatch()  # before the answers: the executor works while they are written
        for batch, outcome in zip(batches, outcomes, strict=True):
            self._deliver(batch, outcome.results)
            self._learn(batch, outcome)
        if len(self._free) == len(self._executors):
            self._idle.set()

    def _learn(self, batch: _Batch, outcome: _Outcome) -> None:
        """Takes note of how a batch went."""
        lane, rows = batch[0].request.lane, len(outcome.results)
        if outcome.learnt_size is not None and outcome.learnt_size < lane.max_batch_size:
            logger.warning("%s ran out of memory; its batches are at most %d rows now", lane.name, outcome.learnt_size)
            lane.max_batch_size = outcome.learnt_size
        ran_s = outcome.ended_at - outcome.started_at
        if ran_s > 0:
            rate = rows / ran_s
            self._rows_per_s = 0.8 * self._rows_per_s + 0.2 * rate if self._rows_per_s else rate
            lane.batch_s = ran_s if lane.batch_s == math.inf else 0.8 * lane.batch_s + 0.2 * ran_s
        self._observe(
            lane,
            BatchRecord(
                rows=rows,
                waits_s=[part.request.queued_s for part in batch if part.start == 0],
                ran_s=ran_s,
                failed_rows=sum(isinstance(result, BaseException) for result in outcome.results),
            ),
        )

    def _deliver(self, batch: _Batch, results: list[Any]) -> None:
        offset, now = 0, self._loop.time()
        for part in batch:
            request, start, count = part.request, part.start, part.stop - part.start
            for index in range(count):
                result = results[offset + index]
                if isinstance(result, BaseException):
                    self._fail_item(request, start + index, result)
                    break
                request.results[start + index] = result
            else:
                request.unanswered -= count
                if not request.unanswered and not request.answer.done():
                    ran_s = now - request.enqueued_at - request.queued_s
                    request.answer.set_result(Answered(request.results, request.queued_s, ran_s))
            offset += count

    def _fail_item(self, request: _Request[Any, Any], index: int, cause: BaseException) -> None:
        if isinstance(cause, DeviceLost):
            self._on_lost(cause)
        if request.answer.done():
            return  # its caller left or its time was up: there is nobody to tell
        if isinstance(cause, Unavailable):
            self._fail(request, cause)  # the device's trouble, not the item's
            return
        logger.error("%s failed for item %d of a request", request.lane.name, index, exc_info=cause)
        failure = InferenceFailed(f"item {index}: {request.lane.name} failed: {type(cause).__name__}")
        failure.__cause__ = cause
        self._fail(request, failure)

    def _expire(self, request: _Request[Any, Any]) -> None:
        timeout_s = request.timeout_at - request.enqueued_at
        self._fail(request, DeadlineExceeded(f"deadline: no answer within {round(timeout_s * 1000)} ms"))

    def _fail(self, request: _Request[Any, Any], error: Exception) -> None:
        self._withdraw(request)
        if not request.answer.done():
            request.answer.set_exception(error)

    def _withdraw(self, request: _Request[Any, Any]) -> None:
        """Takes what still waits of a request out of the queue; harmless when nothing does."""
        self._deadlines.discard(request)
        self._queue.discard(request)


def _rows(batch: _Batch) -> int:
    return sum([part.stop - part.start for part in batch])


def _run_batches(batches: Sequence[_Batch], slot: int) -> list[_Outcome]:
    """Runs batches one after the other, on the executor's thread."""
    return [_run_batch(batch, slot) for batch in batches]


def _run_batch(batch: _Batch, slot: int) -> _Outcome:
    """One result or exception per row; None for rows whose callers left, or whose time was up, before it began."""
    lane = batch[0].request.lane
    lost = [part for part in batch if part.request.answer.done()]
    wanted = [part for part in batch if part not in lost] if lost else batch
    items = [item for part in wanted for item in part.request.items[part.start : part.stop]]
    if not lost:
        return _run_isolating(lane, items, slot)
    outcome = _run_isolating(lane, items, slot) if items else _Outcome([], 0.0, 0.0, None)
    results = iter(outcome.results)
    outcome.results = [None if part in lost else next(results) for part in batch for _ in range(part.stop - part.start)]
    return outcome


def _run_isolating(lane: Lane[Item, Result], items: Sequence[Item], slot: int) -> _Outcome:
    """Runs a batch on the executor's thread: one result or exception per item."""
    started_at = time.perf_counter()
    sizes: list[int] = []
    results = _halving(lane, items, slot, sizes)
    return _Outcome(results, started_at, time.perf_counter(), min(sizes, default=None))


def _halving(lane: Lane[Item, Result], items: Sequence[Item], slot: int, sizes: list[int]) -> list[Result | Exception]:
    """One result per item. Where `run` raises, the items are halved until the bad one stands alone; where it runs out
    of memory, the half that is tried next is added to `sizes`.
    """
    try:
        results = list(lane.run(items, slot))
        if len(results) != len(items):
            raise RuntimeError(f"expected {len(items)} results, got {len(results)}")  # noqa: TRY301  halved like others
    except Exception as error:  # noqa: BLE001  whatever a model raises belongs to the item that made it raise
        if len(items) == 1 or isinstance(error, DeviceLost):
            return [error] * len(items)
        middle = len(items) // 2
        if isinstance(error, OutOfMemory):
            sizes.append(middle)
        return _halving(lane, items[:middle], slot, sizes) + _halving(lane, items[middle:], slot, sizes)
    return results
