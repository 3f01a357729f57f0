"""Items ⇄ batches. Knows asyncio and one executor; knows neither HTTP nor tensors."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from app.errors import DeadlineExceeded, Draining, InferenceFailed, PayloadTooLarge, QueueFull

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Lane(Generic[Item, Result]):
    """Items that may share a batch: what runs them, and how many at a time.

    `run` is called on the executor's thread. It gives one result per item, in order; an exception in a result's place
    fails that item alone, a raised one makes the batch be halved until the bad item stands alone.
    """

    name: str
    run: Callable[[Sequence[Item]], Sequence[Result | Exception]]
    max_batch_size: int


@dataclass(frozen=True)
class Answered(Generic[Result]):
    """A request's results in the order of its items, and where its time went, in seconds."""

    results: list[Result]
    queued_s: float
    ran_s: float


@dataclass(frozen=True)
class BatchRecord:
    """One batch that ran: its rows, how long each of its requests had waited, and how long it ran, in seconds."""

    rows: int
    waits_s: tuple[float, ...]
    ran_s: float
    failed_rows: int


@dataclass(eq=False)
class _Request(Generic[Item, Result]):
    """Some items of one caller; `taken` of them have left the queue, `unanswered` have no result yet."""

    lane: Lane[Item, Result]
    items: Sequence[Item]
    answer: asyncio.Future[Answered[Result]]
    turn: int
    enqueued_at: float
    results: list[Result | None] = field(init=False)
    taken: int = 0
    unanswered: int = field(init=False)
    started_at: float | None = None
    deadline: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.results = [None] * len(self.items)
        self.unanswered = len(self.items)

    @property
    def waiting(self) -> int:
        return len(self.items) - self.taken


@dataclass(frozen=True)
class _Slice(Generic[Item, Result]):
    """A run of one request's items within a batch."""

    request: _Request[Item, Result]
    start: int
    stop: int


class Batcher:
    """Collects the items of many callers into batches for one executor and answers each caller with its own results.

    A batch leaves the moment the executor is free; while it is busy, items gather, up to the lane's `max_batch_size`.
    Lanes take turns by their oldest request; a request larger than a batch gives way to the others after each of its
    batches. Items whose callers left or whose deadline passed are dropped before they run. At most `max_queue_rows`
    items wait.

    Open and close it with `async with`: closing answers whoever still waits and waits for the batch under way. The
    executor, which must have exactly one thread, is the caller's.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_queue_rows: int,
        observe: Callable[[Lane[Any, Any], BatchRecord], None] = lambda _lane, _record: None,
    ) -> None:
        self._executor = executor
        self._max_queue_rows = max_queue_rows
        self._observe = observe
        self._queues: dict[Lane[Any, Any], OrderedDict[_Request[Any, Any], None]] = {}
        self._turns = itertools.count()
        self._waiting_rows = 0
        self._running: Future[Any] | None = None
        self._dispatch_scheduled = False
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._rows_per_s = 0.0  # moving average while busy; 0 until the first batch ran

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self._running else "idle"
        return f"<Batcher {state}, {self._waiting_rows} rows waiting in {len(self._queues)} lanes>"

    @property
    def waiting_rows(self) -> int:
        """Rows that have not left the queue yet."""
        return self._waiting_rows

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for request in [request for queue in self._queues.values() for request in queue]:
            self._fail(request, Draining("the service is shutting down", retry_after_s=1))
        await self._idle.wait()

    async def submit(
        self, lane: Lane[Item, Result], items: Sequence[Item], *, timeout_s: float | None = None
    ) -> Answered[Result]:
        """The results of `items`, in order.

        Args:
            lane: what runs them.
            items: at least one.
            timeout_s: seconds until the caller stops waiting, the time in the queue included.

        Raises PayloadTooLarge, QueueFull and Draining before anything is enqueued; later DeadlineExceeded, and
        InferenceFailed naming the first item that failed.
        """
        if self._closed:
            raise Draining("the service is shutting down", retry_after_s=1)
        if len(items) > self._max_queue_rows:
            raise PayloadTooLarge(f"items: expected at most {self._max_queue_rows}, got {len(items)}")
        if self._waiting_rows + len(items) > self._max_queue_rows:
            raise QueueFull(
                f"queue: {self._waiting_rows} rows wait, {len(items)} more would exceed {self._max_queue_rows}",
                retry_after_s=self._drain_time_s(),
            )
        loop = asyncio.get_running_loop()
        request = _Request(lane, items, loop.create_future(), next(self._turns), time.perf_counter())
        if timeout_s is not None:
            late = DeadlineExceeded(f"deadline: no answer within {round(timeout_s * 1000)} ms")
            request.deadline = loop.call_later(timeout_s, self._fail, request, late)
        self._queues.setdefault(lane, OrderedDict())[request] = None
        self._waiting_rows += len(items)
        self._schedule_dispatch(loop)
        try:
            return await request.answer
        finally:
            # Answered, failed, or the caller was cancelled: in each case nothing of it may stay in the queue.
            self._withdraw(request)

    def _drain_time_s(self) -> float:
        """How long the queue needs to empty at the measured rate, in seconds, from 1 to 60."""
        if not self._rows_per_s:
            return 1.0
        return min(60.0, max(1.0, math.ceil(self._waiting_rows / self._rows_per_s)))

    def _schedule_dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        # Not at once: requests that arrived in the same turn of the loop belong in the same batch.
        if self._running is None and not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_scheduled = False
        if self._running is not None or not self._queues:
            return
        lane, batch = self._next_batch()
        now = time.perf_counter()
        for part in batch:
            if part.request.started_at is None:
                part.request.started_at = now
        items = [item for part in batch for item in part.request.items[part.start : part.stop]]
        loop = asyncio.get_running_loop()
        try:
            self._running = self._executor.submit(_run_isolating, lane.run, items)
        except RuntimeError as error:  # the executor was shut down under us: nobody may be left waiting
            self._deliver(batch, [error] * len(items))
            loop.call_soon(self._dispatch)
            return
        self._idle.clear()
        self._running.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._finish, lane, batch, now, done)  # runs on the worker thread
        )

    def _next_batch(self) -> tuple[Lane[Any, Any], list[_Slice[Any, Any]]]:
        """Takes rows off the lane whose first request has waited longest for its turn."""
        lane, queue = min(self._queues.items(), key=lambda entry: next(iter(entry[1])).turn)
        batch: list[_Slice[Any, Any]] = []
        room = lane.max_batch_size
        while queue and room:
            request = next(iter(queue))
            count = min(room, request.waiting)
            batch.append(_Slice(request, request.taken, request.taken + count))
            request.taken += count
            self._waiting_rows -= count
            room -= count
            if not request.waiting:
                del queue[request]
        if not queue:
            del self._queues[lane]
        return lane, batch

    def _finish(
        self, lane: Lane[Any, Any], batch: list[_Slice[Any, Any]], started_at: float, done: Future[list[Any]]
    ) -> None:
        """Hands each request its rows; runs on the event loop, and frees the executor's slot, whatever happened."""
        self._running = None
        self._idle.set()
        ran_s = time.perf_counter() - started_at
        rows = sum(part.stop - part.start for part in batch)
        try:
            results = done.result()
        except BaseException as error:  # noqa: BLE001  the executor itself failed: everyone in the batch is told
            results = [error] * rows
        self._deliver(batch, results)
        self._requeue(batch)
        self._rows_per_s = 0.8 * self._rows_per_s + 0.2 * rows / ran_s if self._rows_per_s else rows / ran_s
        self._observe(
            lane,
            BatchRecord(
                rows=rows,
                waits_s=tuple(started_at - part.request.enqueued_at for part in batch if part.start == 0),
                ran_s=ran_s,
                failed_rows=sum(isinstance(result, BaseException) for result in results),
            ),
        )
        self._dispatch()

    def _deliver(self, batch: list[_Slice[Any, Any]], results: list[Any]) -> None:
        offset = 0
        for part in batch:
            request, count = part.request, part.stop - part.start
            for index in range(count):
                result = results[offset + index]
                if isinstance(result, BaseException):
                    self._fail_item(request, part.start + index, result)
                    break
                request.results[part.start + index] = result
            else:
                request.unanswered -= count
                if not request.unanswered and not request.answer.done():
                    request.answer.set_result(self._answered(request))
            offset += count

    def _requeue(self, batch: list[_Slice[Any, Any]]) -> None:
        """Puts what is left of a request behind whoever came while its batch ran."""
        for part in batch:
            request = part.request
            queue = self._queues.get(request.lane)
            if queue is not None and request in queue:
                request.turn = next(self._turns)
                queue.move_to_end(request)

    def _answered(self, request: _Request[Any, Any]) -> Answered[Any]:
        started = request.started_at or request.enqueued_at
        return Answered(
            results=request.results,
            queued_s=started - request.enqueued_at,
            ran_s=time.perf_counter() - started,
        )

    def _fail_item(self, request: _Request[Any, Any], index: int, cause: BaseException) -> None:
        logger.error("%s failed for item %d of a request", request.lane.name, index, exc_info=cause)
        failure = InferenceFailed(f"item {index}: {request.lane.name} failed: {type(cause).__name__}")
        failure.__cause__ = cause
        self._fail(request, failure)

    def _fail(self, request: _Request[Any, Any], error: Exception) -> None:
        self._withdraw(request)
        if not request.answer.done():
            request.answer.set_exception(error)

    def _withdraw(self, request: _Request[Any, Any]) -> None:
        """Takes what still waits of a request out of the queue; harmless when nothing does."""
        if request.deadline is not None:
            request.deadline.cancel()
        queue = self._queues.get(request.lane)
        if queue is not None and request in queue:
            del queue[request]
            self._waiting_rows -= request.waiting
            request.taken = len(request.items)
            if not queue:
                del self._queues[request.lane]


def _run_isolating(
    run: Callable[[Sequence[Item]], Sequence[Result | Exception]], items: Sequence[Item]
) -> list[Result | Exception]:
    """One result per item; where `run` raises, the items are halved until the bad one stands alone."""
    try:
        results = list(run(items))
        if len(results) != len(items):
            raise RuntimeError(f"expected {len(items)} results, got {len(results)}")  # noqa: TRY301  halved like others
    except Exception as error:  # noqa: BLE001  whatever a model raises belongs to the item that made it raise
        if len(items) == 1:
            return [error]
        middle = len(items) // 2
        return _run_isolating(run, items[:middle]) + _run_isolating(run, items[middle:])
    return results
