"""Who is next: rows that wait, by lane, priority and caller. Knows no clock, no asyncio and no thread."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Lane(Generic[Item, Result]):
    """Items that may share a batch: what runs them, and how many at a time.

    `run` is called on an executor's thread with the items and that executor's index. It gives one result per item, in
    order; an exception in a result's place fails that item alone, a raised one makes the batch be halved until the bad
    item stands alone. Running out of memory halves `max_batch_size`, for good, and the batch is tried again in halves.
    """

    name: str
    run: Callable[[Sequence[Item], int], Sequence[Result | Exception]]
    max_batch_size: int
    row_bytes: int = 0


@dataclass(eq=False, slots=True)
class Waiting(Generic[Item, Result]):
    """One caller's items; `taken` of them have left the queue, `waiting` are still in it.

    Args:
        lane: what runs them.
        items: at least one.
        caller: whose they are; callers get equal shares of a lane.
        priority: higher goes first.
        due: lanes take turns by the earliest of these; any scale that grows with time.
    """

    lane: Lane[Item, Result]
    items: Sequence[Item]
    caller: str
    priority: int
    due: float
    taken: int = field(default=0, init=False)
    waiting: int = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = len(self.items)


WaitingT = TypeVar("WaitingT", bound=Waiting[Any, Any])


@dataclass(slots=True)
class Slice(Generic[WaitingT]):
    """A run of one request's items within a batch."""

    request: WaitingT
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class FairQueue(Generic[WaitingT]):
    """Waiting requests, handed out as batches of one lane.

    Of the lanes with the highest priority waiting, the one with the earliest due request is next. Within it higher
    priorities go first; callers of one priority share it by rows served (start-time fair queuing); one caller's
    requests take turns, so a large one, which leaves in several batches, lets those behind it in after each.

    Source of the sharing rule: Goyal, Vin & Cheng 1996, start-time fair queuing.
    """

    def __init__(self) -> None:
        self._lanes: dict[Lane[Any, Any], _LaneQueue[WaitingT]] = {}
        self.rows = 0
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[WaitingT]:
        for lane in self._lanes.values():
            yield from lane.requests()

    def push(self, request: WaitingT) -> None:
        """Adds a request, none of whose items was taken yet."""
        queue = self._lanes.get(request.lane)
        if queue is None:
            queue = self._lanes[request.lane] = _LaneQueue()
        queue.push(request)
        self.rows += request.waiting
        self.bytes += request.waiting * request.lane.row_bytes

    def discard(self, request: WaitingT) -> None:
        """Takes what still waits of a request out; harmless when nothing does."""
        lane = self._lanes.get(request.lane)
        if lane is None or not request.waiting:
            return
        self._count_out(request, request.waiting)
        lane.discard(request)
        if not lane:
            del self._lanes[request.lane]

    def take(self) -> list[Slice[WaitingT]]:
        """The next batch, at most its lane's `max_batch_size` rows; at least one row. Only when not empty."""
        lane = min(self._lanes, key=lambda lane: self._lanes[lane].urgency())
        queue = self._lanes[lane]
        batch: list[Slice[WaitingT]] = []
        room = max(1, lane.max_batch_size)
        while room and queue:
            request = queue.next()
            count = min(room, request.waiting)
            batch.append(Slice(request, request.taken, request.taken + count))
            self._count_out(request, count)
            queue.served(request, count)
            room -= count
        if not queue:
            del self._lanes[lane]
        return batch

    def give_way(self, request: WaitingT, due: float) -> None:
        """Puts what is left of a request behind the others of its caller, and its lane behind lanes due before `due`;
        called once its batch has run.
        """
        lane = self._lanes.get(request.lane)
        if lane is not None and request.waiting:
            lane.give_way(request, due)

    def _count_out(self, request: WaitingT, count: int) -> None:
        request.taken += count
        request.waiting -= count
        self.rows -= count
        self.bytes -= count * request.lane.row_bytes


class _LaneQueue(Generic[WaitingT]):
    """One lane's requests by priority."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level[WaitingT]] = {}

    def __bool__(self) -> bool:
        return bool(self._levels)

    def requests(self) -> Iterator[WaitingT]:
        for level in self._levels.values():
            for requests in level.callers.values():
                yield from requests

    def urgency(self) -> tuple[int, float]:
        """The smaller, the sooner this lane is next."""
        highest = max(self._levels)
        return -highest, self._levels[highest].earliest_due()

    def push(self, request: WaitingT) -> None:
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = _Level()
        level.push(request)

    def next(self) -> WaitingT:
        return self._levels[max(self._levels)].next()

    def served(self, request: WaitingT, count: int) -> None:
        self._levels[request.priority].served(request, count)
        self._drop_if_empty(request.priority)

    def discard(self, request: WaitingT) -> None:
        self._levels[request.priority].discard(request)
        self._drop_if_empty(request.priority)

    def give_way(self, request: WaitingT, due: float) -> None:
        self._levels[request.priority].give_way(request, due)

    def _drop_if_empty(self, priority: int) -> None:
        if not self._levels[priority].callers:
            del self._levels[priority]


class _Level(Generic[WaitingT]):
    """The requests of one priority in one lane: callers with their requests in turn, and how much each was served."""

    def __init__(self) -> None:
        self.callers: dict[str, OrderedDict[WaitingT, None]] = {}
        self._size = 0
        self._served: dict[str, float] = {}  # virtual time of every caller here
        self._now = 0.0  # virtual time of the caller served last, where a caller who comes starts
        # Heaps; what is stale in them is dropped when it surfaces.
        self._order: list[tuple[float, int, str]] = []  # callers by virtual time
        self._due: list[tuple[float, int, WaitingT]] = []
        self._counter = itertools.count()

    def push(self, request: WaitingT) -> None:
        requests = self.callers.get(request.caller)
        if requests is None:
            requests = self.callers[request.caller] = OrderedDict()
            self._advance(request.caller, self._now)
        requests[request] = None
        self._size += 1
        self._push_due(request)

    def _push_due(self, request: WaitingT) -> None:
        heapq.heappush(self._due, (request.due, next(self._counter), request))
        if len(self._due) > 2 * self._size + 64:
            # One that waits long at the top must not keep all that came and went below it.
            self._due = [entry for entry in self._due if self._is_current(entry)]
            heapq.heapify(self._due)

    def earliest_due(self) -> float:
        while not self._is_current(self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0]

    @staticmethod
    def _is_current(entry: tuple[float, int, WaitingT]) -> bool:
        return entry[2].waiting > 0 and entry[0] == entry[2].due

    def give_way(self, request: WaitingT, due: float) -> None:
        self.callers[request.caller].move_to_end(request)
        if due > request.due:
            request.due = due
            self._push_due(request)

    def next(self) -> WaitingT:
        """The first request of the caller who was served least."""
        while True:
            time, _, caller = self._order[0]
            if self._served.get(caller) == time:
                self._now = time
                return next(iter(self.callers[caller]))
            heapq.heappop(self._order)

    def served(self, request: WaitingT, count: int) -> None:
        """Counts rows of a request as served, and drops the request if they were its last."""
        time = self._served[request.caller] + count
        if not request.waiting:
            self.discard(request)
        if request.caller in self.callers:
            self._advance(request.caller, time)

    def discard(self, request: WaitingT) -> None:
        requests = self.callers[request.caller]
        del requests[request]
        self._size -= 1
        if not requests:
            del self.callers[request.caller]
            del self._served[request.caller]

    def _advance(self, caller: str, time: float) -> None:
        self._served[caller] = time
        heapq.heappush(self._order, (time, next(self._counter), caller))
