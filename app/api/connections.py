"""HTTP connections below any request: what is no HTTP, or has no end, is answered and cut off. Knows uvicorn alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.api.drain import Drain
from app.api.errors import problem_body
from app.api.in_flight import CONNECTION, InFlight
from app.api.responses import send_whole

MAX_HEAD_BYTES = 64 * 1024
MAX_PIPELINED = 1000
# uvicorn writes the header `date` anew where its count of ticks is a multiple of ten: every time that we wake up.
_TICK_S, _TICK_DRAINING_S, _TICKS_PER_DATE = 0.9, 0.1, 10


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
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses what comes from now on, and finishes what is in flight."""
        self._drain.close()
        await super().shutdown(sockets)


class HttpConnection(HttpToolsProtocol):
    """One connection, with bounds that uvicorn leaves open: on the bytes of request lines, headers, trailers and chunk
    headers, and on requests sent ahead of their answers.

    What is no HTTP gets the service's own error answer.
    """

    working: InFlight | None = None
    """The request that is worked on; at most one, however many were sent ahead."""

    _head_bytes = 0
    """Received since a request began, or since the parser last gave a part of its body."""

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
        if (b"connection", b"close") in headers:
            cycle.keep_alive = False
        content = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            content += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive and (b"connection", b"close") not in headers:
            content.append(b"connection: close\r\n")
        content += (b"\r\n", body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        self.transport.write(b"".join(content))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def data_received(self, data: bytes) -> None:
        """Parses what arrived, unless a head grows beyond `MAX_HEAD_BYTES`."""
        if self.transport.is_closing():
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"headers: expected at most {MAX_HEAD_BYTES} bytes, found more")
        elif len(self.pipeline) > MAX_PIPELINED:
            self.send_400_response(f"connection: expected at most {MAX_PIPELINED} requests sent ahead, found more")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is gone, whoever closed it."""
        super().connection_lost(exc)
        if self.working is not None:
            self.working.leave()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_message_begin()
        cast("dict[str, object]", self.scope)[CONNECTION] = self

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_message_complete()

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
