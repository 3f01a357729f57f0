"""HTTP connections below any request: what is no HTTP, or has no end, is answered and cut off. Knows uvicorn alone."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import Send
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.api.dependencies import WHOLE_BODY
from app.api.drain import Drain
from app.api.errors import problem_body
from app.api.in_flight import CONNECTION, ON_CONNECTION, InFlight
from app.api.responses import send_whole

MAX_HEAD_BYTES = 64 * 1024
MAX_PIPELINED = 1000
# uvicorn writes the header `date` anew where its count of ticks is a multiple of ten: every time that we wake up.
_TICK_S, _TICK_DRAINING_S, _TICKS_PER_DATE = 0.9, 0.1, 10
_UNUSUAL_HEADERS = frozenset({b"expect", b"x-forwarded-for", b"x-forwarded-proto"})


class Server(uvicorn.Server):
    """uvicorn's server, which leaves in steps and ends with exit code 0 when it was asked to end.

    SIGTERM begins the drain: for its pause requests are still answered, then no connection is accepted any more and
    what is in flight is finished. SIGINT leaves the pause out. A second signal ends everything at once.

    Args:
        config: uvicorn's.
        drain: what tells the application of it.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = asyncio.Event()

    async def main_loop(self) -> None:
        """Ticks until it is time to leave: seldom, for idling should cost nothing, and often once it drains."""
        self._loop = asyncio.get_running_loop()
        ticks = 0
        while not await self.on_tick(ticks * _TICKS_PER_DATE % 864_000):
            ticks += 1
            if self._drain.has_begun:
                await asyncio.sleep(_TICK_DRAINING_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._signalled.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's signature
        """Called by the signal; uvicorn's own would kill the process by the same signal again at the end."""
        if self._drain.has_begun:
            self.force_exit = self.should_exit = True
        self._drain.begin()
        if sig == signal.SIGINT:
            self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._signalled.set)

    async def on_tick(self, counter: int) -> bool:
        """Called at every tick; true when it is time to stop accepting."""
        if self._drain.is_over:
            self.should_exit = True
        now_s = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpConnection):
                connection.close_if_idle(now_s)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses what comes from now on, and finishes what is in flight."""
        self._drain.close()
        await super().shutdown(sockets)


class WholeCycle(RequestResponseCycle):
    """A request that arrived in one piece, and its answer. What uvicorn's cycle has for all others is made when asked
    for: making it costs more than most answers.

    Args:
        connection: the request's.
        scope: as ASGI has it.
        body: all of it.
        keep_alive: whether the connection outlives the answer.
    """

    logger = access_logger = logging.getLogger("uvicorn.error")
    access_log = disconnected = waiting_for_100_continue = response_started = response_complete = more_body = False
    chunked_encoding = None
    expected_content_length = 0
    task: asyncio.Task[None]

    def __init__(self, connection: HttpConnection, scope: HTTPScope, body: bytes, *, keep_alive: bool) -> None:
        self.scope = scope
        self.transport = connection.transport
        self.flow = connection.flow
        self.default_headers = connection.server_state.default_headers
        self.on_response = connection.on_response_complete
        self.keep_alive = keep_alive
        self.body = body  # type: ignore[assignment]  # read once, and then replaced

    @cached_property
    def message_event(self) -> asyncio.Event:  # type: ignore[override]  # an attribute there
        """Set: the first thing there is to receive is the body."""
        event = asyncio.Event()
        event.set()
        return event


class HttpConnection(HttpToolsProtocol):
    """One connection, with bounds that uvicorn leaves open: on the bytes of request lines, headers, trailers and chunk
    headers, and on requests sent ahead of their answers.

    What is no HTTP gets the service's own error answer. A request that arrives in one piece, as nearly all do, is
    served as a `WholeCycle`; one that does not, or is unusual in another way, as uvicorn serves it.
    """

    working: InFlight | None = None
    """The request that is worked on; at most one, however many were sent ahead."""

    idle_since_s: float = math.inf
    """When the last answer was sent, by the loop's clock, if nothing was received since."""

    _head_bytes = 0
    """Received since a request began, or since the parser last gave a part of its body."""

    _held: list[bytes] | None = None
    """Parts of the body of a request that may still turn out to have arrived in one piece."""

    _is_forwarded = False
    """Whether a proxy says for whom it asks."""

    async def respond(self, send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Sends a whole answer as uvicorn would in two pieces, head and body in one write: each write is a call of the
        kernel, and for a small answer the greater part of its cost.

        Args:
            send: what the server gave the application.
            status: of the answer.
            headers: with lower-case names, well-formed, the body's length among them.
            body: all of it.
        """
        cycle = getattr(send, "__self__", None)
        if not isinstance(cycle, RequestResponseCycle) or cycle.disconnected or cycle.response_started:
            await send_whole(send, status, headers, body)
            return
        if self.flow.write_paused:
            await self.flow.drain()
        closes = (b"connection", b"close") in headers
        content = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            content += (name, b": ", value, b"\r\n")
        if closes:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            content.append(b"connection: close\r\n")
        content += (b"\r\n", body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        self.transport.write(b"".join(content))
        if "message_event" in cycle.__dict__:
            cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        """Called when somebody has connected; tells the application, if it wants to know."""
        super().connection_made(transport)
        if (on_connection := self.app_state.get(ON_CONNECTION)) is not None:
            on_connection()

    def data_received(self, data: bytes) -> None:
        """Parses what arrived, unless a head grows beyond `MAX_HEAD_BYTES`."""
        if self.transport.is_closing():
            return
        self.idle_since_s = math.inf
        self._head_bytes += len(data)
        super().data_received(data)
        if self._held is not None and not self.transport.is_closing():
            self._serve_in_pieces()
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"headers: expected at most {MAX_HEAD_BYTES} bytes, found more")
        elif len(self.pipeline) > MAX_PIPELINED and not self.transport.is_closing():
            self.send_400_response(f"connection: expected at most {MAX_PIPELINED} requests sent ahead, found more")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is gone, whoever closed it."""
        super().connection_lost(exc)
        if self.working is not None:
            self.working.leave()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = self._is_forwarded = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for each header and each trailer."""
        name = name.lower()
        self.headers.append((name, value))
        if name in _UNUSUAL_HEADERS:
            if name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            else:
                self._is_forwarded = True

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        if (
            (self.cycle is None or self.cycle.response_complete)
            and self.url[:1] == b"/"
            and b"%" not in self.url
            and b"#" not in self.url
            and not self.expect_100_continue
            and self.parser.get_http_version() == "1.1"
            and not self.parser.should_upgrade()
        ):
            self._held = []
        else:
            self._begin()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        if self._held is None:
            super().on_body(body)
        else:
            self._held.append(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        if self._held is None:
            super().on_message_complete()
            return
        held, self._held = self._held, None
        body = held[0] if len(held) == 1 else b"".join(held)
        path, _, query = self.url.partition(b"?")
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "headers": self.headers,
            "state": {},
            "method": self.parser.get_method().decode("ascii"),
            "path": path.decode("ascii"),
            "raw_path": path,
            "query_string": query,
            CONNECTION: self,
            WHOLE_BODY: body,
        }
        cycle = self.cycle = WholeCycle(self, scope, body, keep_alive=self.parser.should_keep_alive())
        # Only what comes through a proxy has to go through uvicorn's reading of what it says.
        app: Any = self.app if self._is_forwarded else self.config.app
        cycle.task = self.loop.create_task(cycle.run_asgi(app))

    def on_response_complete(self) -> None:
        """Called when an answer is sent. Idle connections are closed all at once, by the server, now and then: a timer
        for each answer would cost more.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.idle_since_s = self.loop.time()
            if isinstance(self.cycle, WholeCycle):
                self.cycle = None  # type: ignore[assignment]  # or an idle connection would keep the body

    def close_if_idle(self, now_s: float) -> None:
        """Closes the connection if it was idle for long."""
        if now_s - self.idle_since_s > self.timeout_keep_alive:
            self.transport.close()

    def _serve_in_pieces(self) -> None:
        """Serves as uvicorn does what did not arrive in one piece after all."""
        held, self._held = self._held or [], None
        self._begin()
        for body in held:
            super().on_body(body)

    def _begin(self) -> None:
        """Begins a request as uvicorn does, with what the parser has told so far."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        scope: Any = self.scope
        scope[CONNECTION] = self
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what never became a request, and closes the connection."""
        request_id = os.urandom(16).hex()
        body = problem_body(msg, "invalid_input", request_id)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
