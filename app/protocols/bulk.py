"""POST /bulk/…: items of any number in, answers in order as they are ready, in bounded memory.

What takes which body is here; how a stream is answered while it arrives is `bulk_stream`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import errors
from app.api.dependencies import Model, headers_of, preferred_media_type, read_terms
from app.api.errors import problem_responses
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
from app.codecs.streams import CsvReader, FormReader, NdjsonReader, NpyReader, StreamReader, ZipReader
from app.protocols.bulk_stream import NDJSON, BulkStream
from app.protocols.chunks import ChunkAnswerer, spec_of
from app.protocols.spool import Spool
from app.settings import Settings

CSV, ZIP, FORM = "text/csv", "application/zip", "multipart/form-data"
_NDJSON_TYPES = ("", NDJSON, "application/ndjson", "application/jsonl", "application/x-jsonlines", JSON)


async def _decode(items: Items, model: Model, _query: ModelQuery) -> Any:
    return await decode_latents(items.values, model)


ITEM_ROUTES: tuple[ItemsRoute, ...] = (
    *(route for router in ROUTERS for route in router.item_routes),
    ItemsRoute(
        "/decode", Capability.DECODE, Decoded, ModelQuery, _decode, masked=False, summary="Map each latent vector back"
    ),
)


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
        for name in query.of_whole_request:
            if getattr(query, name) is not None:
                raise errors.InvalidParameter(f"{name}: judges all items of a request together; a stream has no end")
        terms = read_terms(scope, headers, settings, services_of(request).loop)
        inflater = Inflater(headers.get(b"content-encoding", b"").decode("latin-1"))
        media_type, parameters = parse_content_type(headers.get(b"content-type", b"").decode("latin-1"))
        counted = services_of(request).metrics.inference(served.manifest.name, served.manifest.version)
        reader = _reader(route, spec, media_type, parameters, settings)

        async def run(receive: Receive, send: Send) -> None:
            try:
                with counted, Spool(settings.max_spool_bytes) as spool:
                    answerer = ChunkAnswerer(route, query, served, terms.timeout_ms, terms.caller, terms.priority)
                    bulk = BulkStream(request, answerer, reader, inflater, settings, spool)
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
            "parameters": [
                *(p for p in query_parameters(route.query) if p["name"] not in route.query.of_whole_request),
                *HEADER_PARAMETERS,
            ],
            "requestBody": {"required": True, "content": bodies},
        },
        route_class_override=RawRoute,
    )


for _route in ITEM_ROUTES:
    _declare(_route)
