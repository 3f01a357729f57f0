"""The batcher's promises: each request answered exactly once, with its own rows, whatever happens to the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest

import app.batching.batcher
from app.batching.batcher import Answered, Batcher, BatchRecord
from app.batching.queue import Lane
from app.errors import DeadlineExceeded, Draining, InferenceFailed, PayloadTooLarge, QueueFull

BAD = 1313


class Doubler:
    """A model that doubles; holds each batch at a gate, so that the tests decide what is in flight."""

    def __init__(self, max_batch_size: int = 8, name: str = "doubler") -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[list[int]] = []
        self.lane: Lane[int, int] = Lane(name, self.run, max_batch_size)

    def run(self, items: Sequence[int], _slot: int) -> list[int | Exception]:
        assert self.gate.acquire(timeout=10), "nobody opened the gate"
        self.batches.append(list(items))
        if any(item < 0 for item in items):
            self.gate.release(10)  # the halves run without a gate of their own
            raise ArithmeticError("a negative row")
        return [ArithmeticError("a bad row") if item == BAD else item * 2 for item in items]

    def open(self, times: int = 1) -> None:
        self.gate.release(times)


def play(scene: Callable[[Batcher], Coroutine[Any, Any, None]], *, max_queue_rows: int = 64) -> list[BatchRecord]:
    """Plays `scene` with an open batcher; returns the record of every batch."""
    records: list[BatchRecord] = []

    async def act() -> None:
        with ThreadPoolExecutor(max_workers=1) as executor:
            async with Batcher(
                [executor], max_queue_rows=max_queue_rows, observe=lambda _lane, record: records.append(record)
            ) as batcher:
                await scene(batcher)
                assert batcher.waiting_rows == 0, "rows were left behind"

    asyncio.run(asyncio.wait_for(act(), timeout=20))
    return records


async def fill(batcher: Batcher, model: Doubler, requests: int) -> list[asyncio.Task[Answered[int]]]:
    """So many requests of a row each, of which the first runs and the others wait."""
    taken = []
    for index in range(requests):
        taken.append(asyncio.create_task(batcher.submit(model.lane, [index])))
        await settle()
    return taken


async def settle() -> None:
    """Lets every callback that is due run."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_request_gets_its_own_rows_in_order() -> None:
    """Each caller gets the results of its own items, in order, though they shared batches."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler()
        model.open(100)
        answers = await asyncio.gather(*(batcher.submit(model.lane, [i, i + 100]) for i in range(20)))
        assert [answer.results for answer in answers] == [[2 * i, 2 * i + 200] for i in range(20)]
        assert len(model.batches) < 20

    records = play(scene)
    assert sum(record.rows for record in records) == 40


def test_rows_gather_while_the_executor_is_busy_up_to_the_cap() -> None:
    """The first batch leaves at once; what arrives while it runs leaves together, at most max_batch_size rows."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler(max_batch_size=4)
        first = asyncio.create_task(batcher.submit(model.lane, [0]))
        await settle()
        rest = [asyncio.create_task(batcher.submit(model.lane, [i])) for i in range(1, 7)]
        await settle()
        assert batcher.waiting_rows == 6
        model.open(10)
        await asyncio.gather(first, *rest)
        assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]

    play(scene)


def test_a_failing_row_fails_alone() -> None:
    """A row that makes the batch raise is found by halving, and only its request fails, naming its index."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler(max_batch_size=16)
        blocker = asyncio.create_task(batcher.submit(model.lane, [0]))
        await settle()
        good = [asyncio.create_task(batcher.submit(model.lane, [i])) for i in range(1, 8)]
        bad = asyncio.create_task(batcher.submit(model.lane, [50, -1, 51]))
        model.open(2)
        assert [answer.results for answer in await asyncio.gather(*good)] == [[2 * i] for i in range(1, 8)]
        with pytest.raises(InferenceFailed, match="item 1"):
            await bad
        await blocker

    records = play(scene)
    assert sum(record.failed_rows for record in records) == 1


def test_an_exception_in_a_results_place_fails_that_row_alone() -> None:
    """A model may fail one row without raising; nothing runs twice for it."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler()
        model.open(10)
        answers = await asyncio.gather(
            *(batcher.submit(model.lane, [i]) for i in (12, BAD, 14)), return_exceptions=True
        )
        assert isinstance(answers[1], InferenceFailed)
        assert [answer.results for answer in (answers[0], answers[2])] == [[24], [28]]  # type: ignore[union-attr]
        assert model.batches == [[12, BAD, 14]]

    play(scene)


def test_a_cancelled_request_leaves_its_batch_unharmed() -> None:
    """A caller that leaves takes its waiting rows along, and whoever shared a batch with it is answered."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler()
        running = asyncio.create_task(batcher.submit(model.lane, [1]))
        await settle()
        leaving = asyncio.create_task(batcher.submit(model.lane, [2, 3]))
        staying = asyncio.create_task(batcher.submit(model.lane, [4]))
        await settle()
        leaving.cancel()
        running.cancel()  # already on the executor: its slot stays taken until the executor is done
        await settle()
        assert batcher.waiting_rows == 1
        assert model.batches == []
        model.open(10)
        assert (await staying).results == [8]
        assert model.batches == [[1], [4]]

    play(scene)


def test_a_deadline_counts_queue_time_and_drops_the_rows() -> None:
    """A request whose time runs out while the executor is busy fails then, and its rows never run."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler()
        running = asyncio.create_task(batcher.submit(model.lane, [1]))
        await settle()
        with pytest.raises(DeadlineExceeded, match="20 ms"):
            await batcher.submit(model.lane, [2], timeout_s=0.02)
        assert batcher.waiting_rows == 0
        model.open(10)
        await running
        assert model.batches == [[1]]

    play(scene)


def test_a_full_queue_refuses_before_enqueuing() -> None:
    """Beyond the bound a request is refused at once, with a time to come back; more than the bound never fits."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler()
        running = asyncio.create_task(batcher.submit(model.lane, [1]))
        await settle()
        waiting = asyncio.create_task(batcher.submit(model.lane, [2, 3, 4]))
        await settle()
        with pytest.raises(QueueFull) as refusal:
            await batcher.submit(model.lane, [5, 6])
        assert 1 <= refusal.value.retry_after_s <= 60
        with pytest.raises(PayloadTooLarge):
            await batcher.submit(model.lane, [0] * 5)
        fitting = asyncio.create_task(batcher.submit(model.lane, [5]))
        model.open(10)
        await asyncio.gather(running, waiting, fitting)

    play(scene, max_queue_rows=4)


def test_a_large_request_is_split_and_lets_others_in_between() -> None:
    """A request larger than a batch gives way to those behind it after each of its batches, in every lane."""

    async def scene(batcher: Batcher) -> None:
        model, other = Doubler(max_batch_size=4), Doubler(max_batch_size=4)
        other.batches = model.batches  # one list for both, in the order in which they ran
        large = asyncio.create_task(batcher.submit(model.lane, list(range(10, 22))))
        await settle()
        small = asyncio.create_task(batcher.submit(model.lane, [1]))
        elsewhere = asyncio.create_task(batcher.submit(other.lane, [7]))
        await settle()
        model.open(10)
        other.open(10)
        answers = await asyncio.gather(large, small, elsewhere)
        assert [answer.results for answer in answers] == [[2 * i for i in range(10, 22)], [2], [14]]
        assert model.batches == [[10, 11, 12, 13], [1, 14, 15, 16], [7], [17, 18, 19, 20], [21]]

    play(scene)


def test_a_full_queue_rests_no_longer_than_a_batch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """While there is no room the event loop lets arrivals gather, and goes on at once when there is some."""
    monkeypatch.setattr(app.batching.batcher, "_REST_S", 15.0)

    async def scene(batcher: Batcher) -> None:
        model = Doubler(max_batch_size=1)
        taken = await fill(batcher, model, 3)
        with pytest.raises(QueueFull):
            await batcher.submit(model.lane, [3])
        threading.Timer(0.05, model.open, [3]).start()
        started = time.monotonic()
        assert [(await request).results for request in taken] == [[0], [2], [4]]
        assert 0.05 <= time.monotonic() - started < 10

    play(scene, max_queue_rows=2)


def test_a_rest_ends_with_the_next_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it might rest, a request whose time is up while nothing else happens is told so in time."""
    monkeypatch.setattr(app.batching.batcher, "_REST_S", 15.0)

    async def scene(batcher: Batcher) -> None:
        model = Doubler(max_batch_size=1)
        running = asyncio.create_task(batcher.submit(model.lane, [1]))
        await settle()
        late = asyncio.create_task(batcher.submit(model.lane, [2], timeout_s=0.05))
        await settle()
        with pytest.raises(QueueFull):
            await batcher.submit(model.lane, [3])
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await late
        assert time.monotonic() - started < 10
        model.open(2)
        await running

    play(scene, max_queue_rows=1)


def test_new_connections_keep_a_full_service_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop goes on at once while connections come in, and rests again when none came since."""
    rests: list[float | None] = []

    async def scene(batcher: Batcher) -> None:
        monkeypatch.setattr(batcher._has_ended, "wait", rests.append)
        model = Doubler(max_batch_size=1)
        taken = await fill(batcher, model, 2)
        for new_connection in (True, False):
            if new_connection:
                batcher.stay_awake()
            with pytest.raises(QueueFull):
                await batcher.submit(model.lane, [3])
            await settle()
            assert len(rests) == (0 if new_connection else 1)
        model.open(2)
        await asyncio.gather(*taken)

    play(scene, max_queue_rows=1)


def test_a_queue_with_room_for_one_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whoever asks for more than there is room for is refused: a small request may come the next moment."""
    rests: list[float | None] = []

    async def scene(batcher: Batcher) -> None:
        monkeypatch.setattr(batcher._has_ended, "wait", rests.append)
        model = Doubler(max_batch_size=1)
        taken = await fill(batcher, model, 2)  # one more would have room
        with pytest.raises(QueueFull):
            await batcher.submit(model.lane, [3, 4])
        await settle()
        assert rests == []
        model.open(2)
        await asyncio.gather(*taken)

    play(scene, max_queue_rows=2)


def test_lanes_never_share_a_batch() -> None:
    """Rows of different models or methods never meet in one batch."""

    async def scene(batcher: Batcher) -> None:
        one, two = Doubler(name="one"), Doubler(name="two")
        one.open(100)
        two.open(100)
        await asyncio.gather(*(batcher.submit(lane, [i]) for i in range(5) for lane in (one.lane, two.lane)))
        assert sorted(chain(*one.batches)) == sorted(chain(*two.batches)) == [0, 1, 2, 3, 4]

    play(scene)


def test_small_batches_of_several_lanes_go_together() -> None:
    """What is over soon goes to the executor with what another lane has; who leaves before its turn does not run."""

    async def scene(batcher: Batcher) -> None:
        models = [Doubler(name=name) for name in ("zero", "one", "two", "large")]
        zero, one, two, large = models
        for model in models:
            model.lane.batch_s = 1.0 if model is large else 0.0001
        running = [asyncio.create_task(batcher.submit(zero.lane, [0]))]
        await settle()
        running += [asyncio.create_task(batcher.submit(model.lane, [7])) for model in (one, two, large)]
        await settle()
        assert batcher.waiting_rows == 3
        zero.open()
        await running[0]
        await settle()
        assert batcher.waiting_rows == 1, "two of the three go together, the long one waits"
        running[2].cancel()
        await settle()
        one.open()
        assert (await running[1]).results == [14]
        two.open()
        large.open()
        assert (await running[3]).results == [14]
        assert two.batches == []

    play(scene)


def test_closing_answers_whoever_waits() -> None:
    """At shutdown the batch under way is finished, the waiting are told, and nobody new is let in."""

    async def act() -> None:
        model = Doubler()
        with ThreadPoolExecutor(max_workers=1) as executor:
            batcher = Batcher([executor], max_queue_rows=64)
            async with batcher:
                running = asyncio.create_task(batcher.submit(model.lane, [1]))
                await settle()
                waiting = asyncio.create_task(batcher.submit(model.lane, [2]))
                await settle()
                threading.Timer(0.05, model.open).start()
            assert (await running).results == [2]
            with pytest.raises(Draining):
                await waiting
            with pytest.raises(Draining):
                await batcher.submit(model.lane, [3])

    asyncio.run(asyncio.wait_for(act(), timeout=20))


def test_a_dead_executor_leaves_nobody_waiting() -> None:
    """If the executor refuses work, the callers are told instead of hanging."""

    async def act() -> None:
        model = Doubler()
        executor = ThreadPoolExecutor(max_workers=1)
        executor.shutdown()
        async with Batcher([executor], max_queue_rows=64) as batcher:
            answers = await asyncio.gather(
                *(batcher.submit(model.lane, [i]) for i in range(10)), return_exceptions=True
            )
        assert all(isinstance(answer, InferenceFailed) for answer in answers)

    asyncio.run(asyncio.wait_for(act(), timeout=20))


def test_five_hundred_requests_take_fewer_batches() -> None:
    """500 concurrent requests get 500 right answers in fewer batches than requests."""

    async def scene(batcher: Batcher) -> None:
        model = Doubler(max_batch_size=64)
        model.open(1000)
        answers = await asyncio.gather(*(batcher.submit(model.lane, [i + 100]) for i in range(500)))
        assert [answer.results for answer in answers] == [[2 * (i + 100)] for i in range(500)]
        assert len(model.batches) <= 10

    play(scene, max_queue_rows=500)


def test_a_wrong_number_of_results_fails_every_row() -> None:
    """A model that gives fewer results than rows fails them, instead of shifting answers between callers."""

    async def scene(batcher: Batcher) -> None:
        lane: Lane[int, int] = Lane("short", lambda items, _slot: list(items)[: len(items) // 2], 8)
        answers = await asyncio.gather(*(batcher.submit(lane, [i]) for i in range(4)), return_exceptions=True)
        assert all(isinstance(answer, InferenceFailed) for answer in answers)

    play(scene)


def test_the_state_can_be_seen() -> None:
    """The batcher's repr tells its state and how much waits."""

    async def scene(batcher: Batcher) -> None:
        assert "idle" in repr(batcher)
        model = Doubler()
        running = asyncio.create_task(batcher.submit(model.lane, [1]))
        await settle()
        assert "running" in repr(batcher)
        model.open()
        await running

    play(scene)
