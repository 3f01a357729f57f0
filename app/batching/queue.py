"""Who is next: rows that wait, by lane, priority and caller. Knows no clock, no asyncio and no thread."""

from __future__ import annotations

import heapq
import itertools
import math
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
    batch_s: float = field(default=math.inf, init=False)
    """How long its batches ran lately, in seconds."""


class Waiting(Generic[Item, Result]):
    """One caller's items; `taken` of them have left the queue, `waiting` are still in it.

    Args:
        lane: what runs them.
        items: at least one.
        caller: whose they are; callers get equal shares of a lane.
        priority: higher goes first.
        due: lanes take turns by the earliest of these; any scale that grows with time.
    """

    __slots__ = ("caller", "due", "items", "lane", "priority", "taken", "waiting")

    def __init__(self, lane: Lane[Item, Result], items: Sequence[Item], caller: str, priority: int, due: float) -> None:
        self.lane = lane
        self.items = items
        self.caller = caller
        self.priority = priority
        self.due = due
        self.taken = 0
        self.waiting = len(items)


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
        self._lanes: dict[Lane[Any, Any], dict[int, _Level[WaitingT]]] = {}  # by lane and priority; none is empty
        self.rows = 0
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[WaitingT]:
        for levels in self._lanes.values():
            for level in levels.values():
                for requests in level.callers.values():
                    yield from requests

    def push(self, request: WaitingT) -> None:
        """Adds a request, none of whose items was taken yet."""
        lane, priority = request.lane, request.priority
        levels = self._lanes.get(lane)
        if levels is None:
            levels = self._lanes[lane] = {}
        level = levels.get(priority)
        if level is None:
            level = levels[priority] = _Level()
        level.push(request)
        self.rows += request.waiting
        self.bytes += request.waiting * lane.row_bytes

    def discard(self, request: WaitingT) -> None:
        """Takes what still waits of a request out; harmless when nothing does."""
        lane = request.lane
        levels = self._lanes.get(lane)
        if levels is None or not request.waiting:
            return
        self.rows -= request.waiting
        self.bytes -= request.waiting * lane.row_bytes
        request.taken += request.waiting
        request.waiting = 0
        level = levels[request.priority]
        level.discard(request)
        self._drop_if_empty(lane, request.priority, level)

    def next_lane(self) -> Lane[Any, Any]:
        """The lane that the next batch is of. Only when not empty."""
        return next(iter(self._lanes)) if len(self._lanes) == 1 else min(self._lanes, key=self._urgency)

    def take(self) -> list[Slice[WaitingT]]:
        """The next batch, at most its lane's `max_batch_size` rows; at least one row. Only when not empty."""
        lane = self.next_lane()
        levels = self._lanes[lane]
        batch: list[Slice[WaitingT]] = []
        most = room = max(1, lane.max_batch_size)
        while room and levels:
            priority = max(levels)
            level = levels[priority]
            room = level.take(room, batch)
            self._drop_if_empty(lane, priority, level)
        self.rows -= most - room
        self.bytes -= (most - room) * lane.row_bytes
        return batch

    def give_way(self, request: WaitingT, due: float) -> None:
        """Puts what is left of a request behind the others of its caller, and its lane behind lanes due before `due`;
        called once its batch has run.
        """
        levels = self._lanes.get(request.lane)
        if levels is not None and request.waiting:
            levels[request.priority].give_way(request, due)

    def _urgency(self, lane: Lane[Any, Any]) -> tuple[int, float]:
        """The smaller, the sooner the lane is next."""
        levels = self._lanes[lane]
        highest = max(levels)
        return -highest, levels[highest].earliest_due()

    def _drop_if_empty(self, lane: Lane[Any, Any], priority: int, level: _Level[WaitingT]) -> None:
        if not level.callers:
            levels = self._lanes[lane]
            del levels[priority]
            if not levels:
                del self._lanes[lane]


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
        heapq.heappush(self._due, (request.due, next(self._counter), request))
        if len(self._due) > 2 * self._size + 64:
            # One that waits long at the top must not keep all that came and went below it.
            self._due = [entry for entry in self._due if self._is_current(entry)]
            heapq.heapify(self._due)

    def take(self, room: int, batch: list[Slice[WaitingT]]) -> int:
        """Adds rows to the batch, at most `room`, callers taking turns; returns the room that is left."""
        while room and self.callers:
            caller, time = self._least_served()
            requests = self.callers[caller]
            is_alone = len(self.callers) == 1
            while True:
                self._now = time
                request = next(iter(requests))
                start, count = request.taken, min(room, request.waiting)
                batch.append(Slice(request, start, start + count))
                request.taken = start + count
                request.waiting -= count
                room -= count
                time += count
                if not request.waiting:
                    del requests[request]
                    self._size -= 1
                if not (is_alone and room and requests):  # who is alone need not take turns
                    break
            if requests:
                self._advance(caller, time)
            else:
                self._forget(caller)
        return room

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
            heapq.heappush(self._due, (due, next(self._counter), request))

    def discard(self, request: WaitingT) -> None:
        requests = self.callers[request.caller]
        del requests[request]
        self._size -= 1
        if not requests:
            self._forget(request.caller)

    def _least_served(self) -> tuple[str, float]:
        """The caller who was served least, and how much, in virtual time."""
        while True:
            time, _, caller = self._order[0]
            if self._served.get(caller) == time:
                return caller, time
            heapq.heappop(self._order)

    def _forget(self, caller: str) -> None:
        del self.callers[caller]
        del self._served[caller]

    def _advance(self, caller: str, time: float) -> None:
        self._served[caller] = time
        heapq.heappush(self._order, (time, next(self._counter), caller))
