"""POST /bulk/…: items of any number in, answers in order as they are ready, in bounded memory.

Four tasks work on a request: one receives, one reads and groups items, one hands out the answers in order, one writes
them. While the body is still arriving, answers that the client does not read yet go to a spool; most HTTP libraries
read nothing before they have sent everything. After that, slow reading slows the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import anyio.to_thread
import orjson
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import errors
from app.api.dependencies import (
    Model,
    headers_of,
    preferred_media_type,
    read_terms,
)
from app.api.errors import code_of, problem_response, problem_responses
from app.api.routing import (
    COMMON_ERRORS,
    HEADER_PARAMETERS,
    HTML,
    JSON,
    NPY,
    Handler,
    ItemsRoute,
    ModelQuery,
    RawRoute,
    parse_query,
    query_invert,
    query_parameters,
)
from app.api.services import services_of
from app.artifacts.manifest import Capability, InputSpec
from app.capabilities import ROUTERS
from app.capabilities.decode import Decoded, decode_latents
from app.codecs.bodies import Inflater, parse_content_type
from app.codecs.items import Items, Limits
from app.codecs.streams import (
    CsvReader,
    FormReader,
    NdjsonReader,
    NpyReader,
    StreamItem,
    StreamReader,
    ZipReader,
)
from app.protocols.chunks import CHUNK_BYTES, Answer, ChunkAnswerer, Summary, chunk_rows, spec_of, weight_of
from app.protocols.spool import Spool
from app.settings import Settings

NDJSON, CSV, ZIP, FORM = "application/x-ndjson", "text/csv", "application/zip", "multipart/form-data"
_NDJSON_TYPES = ("", NDJSON, "application/ndjson", "application/jsonl", "application/x-jsonlines", JSON)
_CHUNKS_WAITING = 2
_AHEAD_BYTES, _MOST_AHEAD_BYTES = 1024 * 1024, 16 * 1024 * 1024
_LISTEN_AFTER_S = 0.1
_ZIP_FILES_AT_ONCE = 32


async def _decode(items: Items, model: Model, _query: ModelQuery) -> Any:
    return await decode_latents(items.values, model)


ITEM_ROUTES: tuple[ItemsRoute, ...] = (
    *(route for router in ROUTERS for route in router.item_routes),
    ItemsRoute(
        "/decode", Capability.DECODE, Decoded, ModelQuery, _decode, masked=False, summary="Map each latent vector back"
    ),
)


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
class _Bulk:
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


class _Stream(Response):
    """The response that answers a stream while it is read."""

    def __init__(self, run: Callable[[Receive, Send], Any]) -> None:
        super().__init__()
        self._run = run

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(receive, send)


def _handler(route: ItemsRoute) -> Handler:
    async def handle(request: Request) -> Response:
        scope, settings = request.scope, services_of(request).settings
        headers = headers_of(scope)
        query = parse_query(route.query, scope["query_string"])
        served = services_of(request).catalog.find(query.model, route.capability)
        accept = headers.get(b"accept", b"").decode("latin-1")
        if preferred_media_type(accept, (NDJSON, HTML)) is None:
            raise errors.NotAcceptable(f"accept: expected {NDJSON}, found {accept!r}")
        spec = spec_of(route, served.manifest)
        if query_invert(query) is not None and spec.range is None:
            raise errors.InvalidParameter("invert: this model takes records, which have no dark and light")
        terms = read_terms(scope, headers, settings)
        inflater = Inflater(headers.get(b"content-encoding", b"").decode("latin-1"))
        media_type, parameters = parse_content_type(headers.get(b"content-type", b"").decode("latin-1"))
        counted = services_of(request).metrics.inference(served.manifest.name, served.manifest.version)
        reader = _reader(route, spec, media_type, parameters, settings)

        async def run(receive: Receive, send: Send) -> None:
            try:
                with counted, Spool(settings.max_spool_bytes) as spool:
                    answerer = ChunkAnswerer(route, query, served, terms.timeout_ms, terms.caller, terms.priority)
                    bulk = _Bulk(request, answerer, reader, inflater, settings, spool)
                    await bulk.run(receive, send)
                    counted.items = bulk.summary.ok
            finally:
                reader.close()

        return _Stream(run)

    handle.__name__, handle.__doc__ = f"bulk_{route.capability}", f"{route.summary}, for any number of items"
    return handle


def _reader(
    route: ItemsRoute, spec: InputSpec, media_type: str, parameters: dict[str, str], settings: Settings
) -> StreamReader:
    """What reads a body of that type. Raises UnsupportedMediaType, MalformedPayload or InvalidInput."""
    limits = Limits(max_rows=1, max_image_pixels=settings.max_image_pixels)
    most = settings.max_body_bytes
    # curl says form-urlencoded of whatever it sends with -d or --data-binary.
    if media_type in (*_NDJSON_TYPES, "application/x-www-form-urlencoded"):
        return NdjsonReader(spec, limits, most, masked=route.masked)
    if route.masked:
        raise errors.UnsupportedMediaType(
            f"content-type: expected {NDJSON}, which can hold masks, found {media_type!r}"
        )
    if media_type == CSV:
        return CsvReader(spec, most)
    if media_type == NPY:
        return NpyReader(spec)
    if media_type == FORM:
        return FormReader(spec, limits, parameters, most)
    if media_type in (ZIP, "application/x-zip-compressed"):
        return ZipReader(spec, limits, most, settings.max_spool_bytes)
    raise errors.UnsupportedMediaType(
        f"content-type: expected {NDJSON}, {CSV}, {NPY}, {FORM} or {ZIP}, found {media_type!r}"
    )


router = APIRouter(tags=["bulk"])
HOT: dict[str, Handler] = {}

_TEXT = {"schema": {"type": "string"}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_LINES_IN = {
    "schema": {
        "type": "string",
        "description": 'A line each: an instance, or `{"id", "instance"}`; for /bulk/inpaint `{"instance", "mask"}`.',
    }
}


def _declare(route: ItemsRoute) -> None:
    handler = HOT[f"/bulk{route.path}"] = _handler(route)
    bodies = {NDJSON: _LINES_IN}
    if not route.masked:
        bodies |= {CSV: _TEXT, NPY: _BINARY, ZIP: _BINARY, FORM: {"schema": {"type": "object"}}}
    raises = [error for error in COMMON_ERRORS if error not in (errors.InferenceFailed, errors.QueueFull)]
    router.add_api_route(
        f"/bulk{route.path}",
        handler,
        methods=["POST"],
        summary=f"{route.summary}, of any number",
        description="Answers stream in order, one JSON object a line: the route's fields with `index`, and `id` or "
        '`name` where there is one; `{"index", "error", "code"}` in place of an item that failed; last '
        '`{"summary": {"items", "ok", "failed", "anomalies"}}`, which a stream that was cut lacks.',
        response_class=Response,
        responses={
            200: {
                "description": "Answers as they are ready.",
                "content": {NDJSON: _TEXT},
                "headers": {"X-Model": _TEXT, "X-Request-Id": _TEXT},
            },
            **problem_responses(raises),
        },
        openapi_extra={
            "parameters": [*query_parameters(route.query), *HEADER_PARAMETERS],
            "requestBody": {"required": True, "content": bodies},
        },
        route_class_override=RawRoute,
    )


for _route in ITEM_ROUTES:
    _declare(_route)
