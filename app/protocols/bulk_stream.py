"""A stream of items answered while it arrives: in order, as answers are ready, in bounded memory.

Four tasks work on a request: one receives, one reads and groups items, one hands out the answers in order, one writes
them. While the body is still arriving, answers that the client does not read yet go to a spool; most HTTP libraries
read nothing before they have sent everything. After that, slow reading slows the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import anyio.to_thread
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from app import errors
from app.api.errors import code_of, problem_response
from app.codecs.bodies import Inflater
from app.codecs.streams import StreamItem, StreamReader, ZipReader
from app.protocols.chunks import CHUNK_BYTES, Answer, ChunkAnswerer, Summary, chunk_rows, weight_of
from app.protocols.spool import Spool
from app.settings import Settings

NDJSON = "application/x-ndjson"
_CHUNKS_WAITING = 2
_AHEAD_BYTES, _MOST_AHEAD_BYTES = 1024 * 1024, 16 * 1024 * 1024
_LISTEN_AFTER_S = 0.1
_ZIP_FILES_AT_ONCE = 32


@dataclass(frozen=True)
class _Chunk:
    """Consecutive items of a stream, the first of which has the index `start`."""

    start: int
    items: list[StreamItem]


@dataclass(frozen=True)
class _Lines:
    """A chunk's answers, and what they come to."""

    data: bytes
    summary: Summary


@dataclass(frozen=True)
class _Cut:
    """What ends a stream before its time."""

    error: errors.ServiceError


@dataclass
class BulkStream:
    """One stream of items being answered."""

    request: Request
    answerer: ChunkAnswerer
    reader: StreamReader
    inflater: Inflater
    settings: Settings
    spool: Spool
    pending: list[StreamItem] = field(default_factory=list)
    pending_bytes: int = 0
    begun: int = 0  # items that were handed to a task
    body_complete: bool = False
    busy: bool = False
    summary: Summary = field(default_factory=Summary)
    problem: errors.ServiceError | None = None
    reading: asyncio.Task[None] | None = None
    receiving: asyncio.Task[None] | None = None
    arrived: asyncio.Queue[bytes | errors.ServiceError | None] = field(default_factory=asyncio.Queue)
    ahead_bytes: int = 0
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Queue[asyncio.Task[_Lines | _Cut] | _Cut | None] = field(
        default_factory=lambda: asyncio.Queue(_CHUNKS_WAITING)
    )

    @property
    def chunk_rows(self) -> int:
        """Most items of a chunk."""
        return chunk_rows(self.answerer.served, self.settings.max_queue_rows)

    async def run(self, receive: Receive, send: Send) -> None:
        """Answers the whole stream. Raises ClientDisconnect when the client leaves."""
        try:
            async with asyncio.TaskGroup() as group:
                self.receiving = group.create_task(self._receive(receive))
                self.reading = group.create_task(self._read(group))
                collecting = group.create_task(self._collect(receive, group))
                await self._write(send)
                for task in (self.receiving, self.reading, collecting):
                    if task is not None:
                        task.cancel()
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _receive(self, receive: Receive) -> None:
        """Receives the body, a little ahead of who reads it, and watches for the client's leaving.

        Raises ClientDisconnect.
        """
        more = True
        while more:
            try:
                async with asyncio.timeout(self.answerer.timeout_ms / 1000):
                    message = await receive()
            except TimeoutError:
                problem = f"deadline: nothing of the body came for {self.answerer.timeout_ms} ms"
                self.arrived.put_nowait(errors.DeadlineExceeded(problem))
                break
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more = message.get("more_body", False)
            self.body_complete = not more
            data = message.get("body", b"")
            self.arrived.put_nowait(data)
            self.ahead_bytes += len(data)
            if more and self.ahead_bytes > _AHEAD_BYTES:
                await self._taken()
        else:
            self.arrived.put_nowait(None)
        await _until_left(receive)

    async def _taken(self) -> None:
        """Returns when more of the body may be received; after a while in any case, up to `_MOST_AHEAD_BYTES`.

        That a client has left is told only behind what it had sent: where nothing moves, that has to be received.
        """
        patience_s = _LISTEN_AFTER_S if self.ahead_bytes < _MOST_AHEAD_BYTES else None
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self.ahead_bytes > _AHEAD_BYTES:
                    self.taken.clear()
                    await self.taken.wait()

    async def _read(self, group: asyncio.TaskGroup) -> None:
        """Reads the body and groups its items."""
        try:
            empty = True
            async for data in self._body():
                for plain in self.inflater.feed(data):
                    empty = False
                    for item in self.reader.feed(plain):
                        await self._add(item, group)
                    await asyncio.sleep(0)  # a little that unpacks to much must not keep others waiting
                self._begin_if_idle(group)
            self.inflater.end()
            if empty:
                raise errors.MalformedPayload("body: expected items, found an empty body")
            async for item in self._rest():
                await self._add(item, group)
            await self._flush(group)
            await self.answering.put(None)
        except errors.ServiceError as error:
            await self._flush(group)
            await self.answering.put(_Cut(error))

    async def _body(self) -> AsyncIterator[bytes]:
        while (data := await self.arrived.get()) is not None:
            if isinstance(data, errors.ServiceError):
                raise data
            self.ahead_bytes -= len(data)
            self.taken.set()
            yield data

    async def _rest(self) -> AsyncIterator[StreamItem]:
        """The items that the reader has at the end; a zip's files are read and unpacked off the event loop."""
        left = self.reader.end()
        if not isinstance(self.reader, ZipReader):
            for item in left:
                yield item
            return
        while items := await anyio.to_thread.run_sync(_some, left):
            for item in items:
                yield item

    async def _add(self, item: StreamItem, group: asyncio.TaskGroup) -> None:
        self.pending.append(item)
        self.pending_bytes += weight_of(item)
        if len(self.pending) >= self.chunk_rows or self.pending_bytes >= CHUNK_BYTES:
            await self._flush(group)

    async def _flush(self, group: asyncio.TaskGroup) -> None:
        """Hands what is pending to a task, as soon as few enough others wait."""
        if self.pending:
            await self.answering.put(self._begin(group))

    def _begin_if_idle(self, group: asyncio.TaskGroup) -> None:
        """Starts with what is pending where nothing else is being worked on: who sends slowly is answered at once."""
        if self.pending and not self.busy and self.answering.empty():
            self.answering.put_nowait(self._begin(group))

    def _begin(self, group: asyncio.TaskGroup) -> asyncio.Task[_Lines | _Cut]:
        chunk = _Chunk(self.begun, self.pending)
        self.begun += len(chunk.items)
        self.pending, self.pending_bytes = [], 0
        return group.create_task(self._answer(chunk))

    async def _collect(self, receive: Receive, group: asyncio.TaskGroup) -> None:
        """Puts the answers into the spool in order, and ends it."""
        while (found := await self.answering.get()) is not None:
            self.busy = True
            answered = found if isinstance(found, _Cut) else await found
            try:
                if isinstance(answered, _Cut):
                    raise answered.error
                if self.body_complete:
                    await self.spool.room()
                self.spool.put(answered.data)
            except errors.ServiceError as error:
                self._cut(error, receive, group)
                return
            self.summary.add(answered.summary)
            self.busy = False
            self._begin_if_idle(group)
        self.spool.finish(orjson.dumps({"summary": self.summary}) + b"\n")

    def _cut(self, error: errors.ServiceError, receive: Receive, group: asyncio.TaskGroup) -> None:
        """Ends the stream with an error: as its status if nothing was answered yet, else as its last line."""
        if self.reading is not None:
            self.reading.cancel()
        while not self.answering.empty():
            left = self.answering.get_nowait()
            if isinstance(left, asyncio.Task):
                left.cancel()
        if self.receiving is not None:
            self.receiving.cancel()
        # What the client still sends is dropped, or it would never come to reading why.
        self.receiving = group.create_task(_until_left(receive))
        if not self.summary.items:
            self.problem = error
            self.spool.finish()
            return
        line = {"index": self.summary.items, "error": str(error), "code": code_of(error)}
        self.spool.finish(orjson.dumps(line) + b"\n")

    async def _write(self, send: Send) -> None:
        data = await self.spool.take()
        if not data:
            response = problem_response(self.request, self.problem or errors.InvalidInput("body: no items"))
            await response(self.request.scope, self.request.receive, send)
            return
        headers = [(b"content-type", NDJSON.encode()), (b"x-model", str(self.answerer.served).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while data:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            data = await self.spool.take()
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, chunk: _Chunk) -> _Lines | _Cut:
        """The chunk's lines."""
        try:
            answers = await self.answerer.answer(chunk.items, chunk.start)
        except errors.ServiceError as error:
            return _Cut(error)
        summary = Summary()
        lines = []
        for index, (item, answer) in enumerate(zip(chunk.items, answers, strict=True), chunk.start):
            summary.count(answer)
            lines.append(_line(index, item, answer))
        return _Lines(b"".join(lines), summary)


def _line(index: int, item: StreamItem, answer: Answer) -> bytes:
    line: dict[str, Any] = {"index": index}
    if item.id is not None:
        line["id"] = item.id
    if item.name is not None:
        line["name"] = item.name
    if isinstance(answer, errors.ServiceError):
        line |= {"error": str(answer), "code": code_of(answer)}
    else:
        line |= answer
    return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _some(items: Iterator[StreamItem]) -> list[StreamItem]:
    """The next few items, fewer of large ones."""
    found: list[StreamItem] = []
    held_bytes = 0
    for item in islice(items, _ZIP_FILES_AT_ONCE):
        found.append(item)
        held_bytes += weight_of(item)
        if held_bytes > CHUNK_BYTES:
            break
    return found


async def _until_left(receive: Receive) -> None:
    """Raises ClientDisconnect when the client leaves; what it still sends is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
