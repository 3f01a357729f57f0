"""A request while it is worked on: ended when its time is up or its client has left, whatever it waits for then."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.api.dependencies import Terms
from app.batching.deadlines import Deadlines
from app.errors import DeadlineExceeded

CONNECTION = "hourglass.connection"
"""Where in a scope a server leaves a `Connection`, if it has one."""

ON_CONNECTION = "hourglass.on_connection"
"""Where in the lifespan's state the application leaves what it wants to have called for each new connection."""

_WATCH_AFTER_S = 0.01


class Connection(Protocol):
    """What a server may know of a connection beyond what ASGI says."""

    working: InFlight | None
    """The request that is worked on, told by `leave` when its client has left: at once and at no cost."""

    async def respond(self, send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Sends a whole answer to a request that is no HEAD, at less cost than in pieces."""


class InFlight:
    """Cancels what runs inside, and raises DeadlineExceeded or ClientDisconnect in its place.

    Opened with `with`, in the task that does the work.

    Args:
        deadlines: of all requests, with `InFlight.expire` as what they call.
        scope: the request's.
        terms: which deadline it has.
    """

    __slots__ = ("_cause", "_connection", "_deadlines", "_task", "_terms", "_timer", "_watching", "waits_for")

    def __init__(self, deadlines: Deadlines[InFlight], scope: Scope, terms: Terms) -> None:
        self.waits_for = "the body was not there"
        self._deadlines = deadlines
        self._connection: Connection | None = scope.get(CONNECTION)
        self._terms = terms
        self._task: asyncio.Task[object] | None = None
        self._cause: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task(self._terms.loop)
        self._deadlines.add(self, self._terms.deadline)
        if self._connection is not None:
            self._connection.working = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._deadlines.discard(self)
        if self._connection is not None:
            self._connection.working = None
        elif self._timer is not None:
            self._timer.cancel()
            if self._watching is not None:
                self._watching.cancel()
        if self._cause is None or not isinstance(error, asyncio.CancelledError):
            return
        if self._task is not None and self._task.uncancel():
            return  # cancelled by somebody else as well, which goes first
        raise self._cause from None

    def body_is_read(self, receive: Receive) -> None:
        """From now on the answer is waited for, and `receive` has nothing more to tell than that the client left.

        Where the server does not tell it by itself, a task waits for that, after a moment: most requests are answered
        by then.
        """
        self.waits_for = "no answer"
        if self._connection is None:
            self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._watch, receive)

    def expire(self) -> None:
        """The time is up."""
        self._end(DeadlineExceeded(f"deadline: {self.waits_for} within {self._terms.timeout_ms} ms"))

    def leave(self) -> None:
        """The client has left."""
        self._end(ClientDisconnect())

    def _end(self, cause: Exception) -> None:
        if self._cause is None and self._task is not None:
            self._cause = cause
            self._task.cancel()

    def _watch(self, receive: Receive) -> None:
        async def until_left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.leave()

        self._watching = asyncio.get_running_loop().create_task(until_left())
