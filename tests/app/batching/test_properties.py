"""Whatever happens in whatever order: the batcher on a virtual clock, driven by a state machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.batching.batcher import Answered, Batcher
from app.batching.queue import FairQueue, Lane, Waiting
from app.errors import DeadlineExceeded, Draining, InferenceFailed, OutOfMemory, PayloadTooLarge, QueueFull

MAX_QUEUE_ROWS = 24
MAX_QUEUE_BYTES = 1600
CALLERS = ("ann", "bob", "eve")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until it is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Runs every callback that is due now, and what these make due."""
        for _ in range(12):
            self.call_soon(self.stop)
            self.run_forever()


class ManualExecutor(Executor):
    """Holds each job until the test runs it."""

    def __init__(self, on_start: Callable[[Sequence[Row]], None]) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.on_start = on_start

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert not self.jobs, "an executor was given batches while it had some"
        parts = [part for batch in args[0] for part in batch]
        self.on_start([row for part in parts for row in part.request.items[part.start : part.stop]])
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run_one(self) -> None:
        future, job = self.jobs.pop(0)
        future.set_result(job())


@dataclass(frozen=True)
class Row:
    """One row: which request it belongs to, its place there, and whether it makes the model fail."""

    request: int
    index: int
    bad: bool


@dataclass
class Sent:
    """What the test knows of a request that it sent."""

    number: int
    lane: int
    rows: list[Row]
    deadline: float | None
    task: asyncio.Task[Answered[Row]]
    known_dead: bool = False  # cancelled or expired, as of the last settled moment


class BatcherMachine(RuleBasedStateMachine):
    """Requests arrive, are cancelled, expire, fail, run out of memory; at the end the batcher is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        asyncio.set_event_loop(None)
        self.executors = [ManualExecutor(self.batch_starts), ManualExecutor(self.batch_starts)]
        self.sent: list[Sent] = []
        self.ran: list[Row] = []
        self.ran_dead = False
        self.started: set[Row] = set()
        self.memory_rows = 10_000
        self.lanes = [
            Lane(f"lane {index}", self.model(index), max_batch_size=size, row_bytes=size_bytes)
            for index, (size, size_bytes) in enumerate(((4, 10), (7, 100)))
        ]
        self.caps = [lane.max_batch_size for lane in self.lanes]
        self.batcher = self.play(self.make())

    async def make(self) -> Batcher:
        return Batcher(self.executors, max_queue_rows=MAX_QUEUE_ROWS, max_queue_bytes=MAX_QUEUE_BYTES)

    def play(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def batch_starts(self, rows: Sequence[Row]) -> None:
        for row in rows:
            assert row not in self.started, "a row was started twice"
            self.started.add(row)

    def model(self, lane: int) -> Callable[[Sequence[Row], int], list[Row | Exception]]:
        def run(rows: Sequence[Row], slot: int) -> list[Row | Exception]:
            assert 0 < len(rows) <= self.caps[lane], "the cap was exceeded"
            for row in rows:
                sent = self.sent[row.request]
                assert sent.lane == lane, "a row met another lane's"
                self.ran_dead |= sent.known_dead  # the batcher would catch what is raised here
            if len(rows) > self.memory_rows:
                raise OutOfMemory(f"{len(rows)} rows")
            if len(rows) > 1 and any(row.bad for row in rows):
                raise ArithmeticError("somewhere in here")
            self.ran += rows
            return [ArithmeticError("this one") if row.bad else row for row in rows]

        return run

    @rule(
        lane=st.integers(0, 1),
        count=st.integers(1, 12),
        bad=st.sets(st.integers(0, 11), max_size=1),
        timeout=st.none() | st.integers(1, 20),
        caller=st.sampled_from(CALLERS),
        priority=st.integers(0, 2),
    )
    def arrive(self, lane: int, count: int, bad: set[int], timeout: int | None, caller: str, priority: int) -> None:
        number = len(self.sent)
        rows = [Row(number, index, index in bad) for index in range(count)]
        before = self.batcher.waiting_rows
        bytes_before = self.waiting_bytes()
        work = self.batcher.submit(self.lanes[lane], rows, timeout_s=timeout, caller=caller, priority=priority)
        deadline = None if timeout is None else self.loop.now + timeout
        self.sent.append(Sent(number, lane, rows, deadline, self.loop.create_task(work)))
        self.loop.settle()
        task = self.sent[-1].task
        full = before + count > MAX_QUEUE_ROWS or bytes_before + count * self.lanes[lane].row_bytes > MAX_QUEUE_BYTES
        refused = task.done() and isinstance(task.exception(), QueueFull | PayloadTooLarge)
        assert refused == full

    def waiting_bytes(self) -> int:
        return sum(
            request.waiting * request.lane.row_bytes
            for request in self.batcher._queue  # the queue's own count is what is checked against this
        )

    @precondition(lambda self: self.pending())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from(self.pending()))
        sent.task.cancel()
        self.loop.settle()
        assert sent.task.cancelled()
        sent.known_dead = True

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds: int) -> None:
        self.loop.now += seconds
        self.loop.settle()
        for sent in self.pending():
            assert sent.deadline is None or sent.deadline > self.loop.now, "a deadline passed unnoticed"
        for sent in self.sent:
            if sent.task.done() and not sent.task.cancelled() and isinstance(sent.task.exception(), DeadlineExceeded):
                sent.known_dead = True

    @precondition(lambda self: any(executor.jobs for executor in self.executors))
    @rule(data=st.data())
    def batch_runs(self, data: st.DataObject) -> None:
        executor = data.draw(st.sampled_from([executor for executor in self.executors if executor.jobs]))
        executor.run_one()
        self.loop.settle()

    @precondition(lambda self: any(executor.jobs for executor in self.executors))
    @rule(rows=st.integers(1, 3))
    def memory_runs_out(self, rows: int) -> None:
        """Batches of more than `rows` do not fit just now."""
        self.memory_rows = rows
        next(executor for executor in self.executors if executor.jobs).run_one()
        self.loop.settle()
        self.memory_rows = 10_000

    def pending(self) -> list[Sent]:
        return [sent for sent in self.sent if not sent.task.done()]

    @invariant()
    def the_dead_do_not_run(self) -> None:
        assert not self.ran_dead, "a row was run after its cancellation or expiry was known"

    @invariant()
    def counts_are_true(self) -> None:
        """What waits is what the requests in the queue have left; nothing waits of a request that is resolved."""
        queued = list(self.batcher._queue)
        assert self.batcher.waiting_rows == sum(request.waiting for request in queued) <= MAX_QUEUE_ROWS
        assert self.batcher._queue.bytes == self.waiting_bytes() <= MAX_QUEUE_BYTES
        assert all(not request.answer.done() for request in queued)

    @invariant()
    def no_executor_idles_while_rows_wait(self) -> None:
        if self.batcher.waiting_rows:
            assert all(executor.jobs for executor in self.executors)

    @invariant()
    def right_rows_only(self) -> None:
        """An answer has the request's own rows, in order; nothing ran twice."""
        good = [row for row in self.ran if not row.bad]
        assert len(good) == len(set(good)), "a row ran twice"
        for sent in self.sent:
            if sent.task.done() and not sent.task.cancelled() and sent.task.exception() is None:
                assert sent.task.result().results == sent.rows
                assert not any(row.bad for row in sent.rows)

    def teardown(self) -> None:
        closing = self.loop.create_task(self.batcher.__aexit__(None, None, None))
        self.loop.settle()
        started = set(self.started)
        while any(executor.jobs for executor in self.executors):
            next(executor for executor in self.executors if executor.jobs).run_one()
            self.loop.settle()
        assert closing.done()
        assert self.started == started, "something was started after closing"
        for sent in self.sent:
            assert sent.task.done(), f"request {sent.number} was left waiting"
            if not sent.task.cancelled():
                error = sent.task.exception()
                expected = (QueueFull, PayloadTooLarge, DeadlineExceeded, InferenceFailed, Draining)
                assert error is None or isinstance(error, expected), error
        self.loop.close()


BatcherMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_batcher_keeps_its_promises = BatcherMachine.TestCase


@given(
    sizes=st.lists(st.tuples(st.sampled_from(CALLERS[:2]), st.integers(1, 9)), min_size=40, max_size=80),
    cap=st.integers(1, 8),
)
def test_callers_share_a_lane_by_rows(sizes: list[tuple[str, int]], cap: int) -> None:
    """While two callers both wait, neither is served more rows than the other by more than a batch and a request."""
    queue: FairQueue[Waiting[Any, Any]] = FairQueue()
    lane: Lane[Any, Any] = Lane("lane", lambda rows, _slot: list(rows), cap)
    for number, (caller, rows) in enumerate(sizes):
        queue.push(Waiting(lane, [number] * rows, caller, 0, float(number)))
    served = dict.fromkeys(CALLERS[:2], 0)
    while {request.caller for request in queue} == set(CALLERS[:2]):
        for part in queue.take():
            served[part.request.caller] += len(part)
            queue.give_way(part.request, float(len(sizes)))
        assert abs(served["ann"] - served["bob"]) <= cap + max(rows for _, rows in sizes)


@given(requests=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=40))
def test_priorities_go_first_and_lanes_by_due(requests: list[tuple[int, int, int]]) -> None:
    """A batch is of one lane: of those with the highest priority waiting, the one that is due first."""
    queue: FairQueue[Waiting[Any, Any]] = FairQueue()
    lanes: list[Lane[Any, Any]] = [Lane(f"lane {i}", lambda rows, _slot: list(rows), 3) for i in range(3)]
    for lane, priority, rows in requests:
        queue.push(Waiting(lanes[lane], [0] * rows, "", priority, float(len(list(queue)))))
    while queue:
        waiting = list(queue)
        highest = max(request.priority for request in waiting)
        first = min((r for r in waiting if r.priority == highest), key=lambda request: request.due)
        batch = queue.take()
        assert {part.request.lane for part in batch} == {first.lane}
        assert [part.request.priority for part in batch] == sorted((p.request.priority for p in batch), reverse=True)
    assert queue.rows == queue.bytes == 0
