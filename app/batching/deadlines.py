"""Any number of deadlines on one timer of the event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

# Loops round timers to milliseconds: what is due within one is due, and what follows within two waits for company.
_EARLY_S = 0.001
_APART_S = 0.002


class Deadlines(Generic[KeyT]):
    """Calls `expire` with each key whose deadline passes before it is discarded.

    A timer of its own would cost every request more than the two dictionary entries that it costs here: nearly all are
    answered long before their deadlines.

    Args:
        expire: called on the event loop, once for a key.
    """

    def __init__(self, expire: Callable[[KeyT], None]) -> None:
        self._expire = expire
        self._deadlines: dict[KeyT, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __repr__(self) -> str:
        return f"<Deadlines of {len(self._deadlines)}>"

    @property
    def due_at(self) -> float:
        """When the first of them may pass, in seconds of the running loop's clock; infinite without any."""
        return self._timer_at

    def add(self, key: KeyT, deadline: float) -> None:
        """Sets a key's deadline, in seconds of the running loop's clock."""
        self._deadlines[key] = deadline
        if deadline < self._timer_at:
            self._arm(deadline)

    def discard(self, key: KeyT) -> None:
        """Forgets a key; harmless for one that is not known."""
        self._deadlines.pop(key, None)

    def close(self) -> None:
        """Forgets all of them."""
        self._deadlines.clear()
        self._disarm()

    def _arm(self, at: float) -> None:
        self._disarm()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._fire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, math.inf

    def _fire(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = asyncio.get_running_loop().time()
        due = [key for key, deadline in self._deadlines.items() if deadline <= now + _EARLY_S]
        for key in due:
            del self._deadlines[key]
        if self._deadlines:
            self._arm(max(min(self._deadlines.values()), now + _APART_S))
        for key in due:
            self._expire(key)
