"""Declared once, served raw: an endpoint's schemas make the OpenAPI document, its requests are read as bytes.

`InferenceRouter` registers an endpoint under the machinery that all of them share: find the model, read the body, run
the endpoint, encode the answer as the caller accepts it.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import parse_qsl

import numpy as np
from fastapi import APIRouter
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.requests import Request
from starlette.responses import Response

from app import errors
from app.api.decoding import decode
from app.api.dependencies import (
    Model,
    headers_of,
    preferred_media_type,
    read_body,
    read_terms,
)
from app.api.errors import problem_responses
from app.api.in_flight import InFlight
from app.api.responses import Answer, encode_json
from app.api.services import Services
from app.artifacts.manifest import Capability, InputSpec
from app.codecs.bodies import Body
from app.codecs.images import encode_png
from app.codecs.items import Items, Limits, ReadItems, bring_to_input, read_items
from app.codecs.npy import encode_npy

JSON, PNG, NPY = "application/json", "image/png", "application/x-npy"
HTML = "text/html"  # what a browser asks for; it gets JSON, pictures too being among what it accepts
_WITH_PICTURES, _WITHOUT_PICTURES = (JSON, HTML, PNG, NPY), (JSON, HTML, NPY)

# Below these, decoding costs less than handing it to another thread.
INLINE_BYTES = 128 * 1024
INLINE_PIXELS = 256 * 256

COMMON_ERRORS: tuple[type[errors.ServiceError], ...] = (
    errors.InvalidInput,
    errors.ShapeMismatch,
    errors.InvalidParameter,
    errors.Unauthorized,
    errors.Forbidden,
    errors.ModelNotFound,
    errors.NotAcceptable,
    errors.CapabilityNotSupported,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.MalformedPayload,
    errors.QueueFull,
    errors.InferenceFailed,
    errors.NotReady,
    errors.ModelUnavailable,
    errors.NoModels,
    errors.Draining,
    errors.DeadlineExceeded,
)


class ModelQuery(BaseModel):
    """Query parameters of every inference route."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of_whole_request: ClassVar[tuple[str, ...]] = ()
    """Parameters that judge all items of a request together, so that a stream cannot have them."""

    model: str | None = Field(
        None,
        description="`name` or `name:version`. Without it: the default for what is asked.",
        examples=["mnist-conv"],
    )
    images: Literal["png"] | None = Field(
        None, description="`png`: pictures in a JSON answer are base64 PNG files instead of nested numbers."
    )


class ItemsQuery(ModelQuery):
    """Query parameters of the routes that take items."""

    invert: bool | None = Field(
        None,
        description="`true` inverts every item (dark on light), `false` none; unset, the model's polarity rule decides "
        "for pictures.",
    )


@dataclass(slots=True)
class Results:
    """What an endpoint answers, before anyone knows in which format.

    Args:
        columns: one value per item under each name of the answer's schema; arrays have the items first.
        main: the array that `Accept: application/x-npy` answers, or what makes it when it is wanted.
        pictures: the column that `Accept: image/png` shows; None if there is nothing to show.
        beside: members that stand beside `results`.
        shared: members that are the same in every item's answer, behind its columns.
    """

    columns: dict[str, Sequence[Any] | NDArray[Any]]
    main: NDArray[Any] | Callable[[], NDArray[Any]]
    pictures: str | None = None
    beside: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def array(self) -> NDArray[Any]:
        """The main array."""
        return self.main() if callable(self.main) else self.main


@dataclass(frozen=True)
class Content:
    """A body that is not made of items, and how much it may hold."""

    body: Body
    limits: Limits


@dataclass(frozen=True)
class ItemsRoute:
    """A declared route that takes items, for other protocols that ask the same of it."""

    path: str
    capability: Capability
    answers: type[BaseModel]
    query: type[ModelQuery]
    endpoint: Callable[[Items, Model, Any], Awaitable[Results]]
    masked: bool
    summary: str


QueryT = TypeVar("QueryT", bound=ModelQuery)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class RawRoute(APIRoute):
    """A route whose endpoint takes the request and gives the response, with none of FastAPI's work per request."""

    def get_route_handler(self) -> Handler:
        """The endpoint itself."""
        handler: Handler = self.endpoint
        return handler


class InferenceRouter(APIRouter):
    """Registers inference endpoints; see `items` and `body`.

    `hot` has each endpoint's handler by its path, for whoever wants to skip the routing that leads to it; `item_routes`
    has what answers each item by itself.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.hot: dict[str, Handler] = {}
        self.item_routes: list[ItemsRoute] = []

    def items(
        self,
        path: str,
        *,
        capability: Capability,
        answers: type[BaseModel],
        query: type[QueryT],
        also: tuple[Capability, ...] = (),
        masked: bool = False,
        shows_pictures: bool = True,
        by_item: bool = True,
    ) -> Callable[[Callable[[Items, Model, QueryT], Awaitable[Results]]], Callable[..., Awaitable[Results]]]:
        """Declares `endpoint(items, model, query)` at POST `path`: items in, one `answers` per item out.

        `also` names what the model must be able to do besides; `masked` wants masks beside the items;
        `shows_pictures` says whether there is something to show as a PNG; `by_item` whether each item is answered by
        itself, so that streams of them can be.
        """

        def read(body: Body, model: Model, query: QueryT, limits: Limits) -> Items | Awaitable[Items]:
            spec, invert = model.served.manifest.input, query_invert(query)
            if invert is not None and spec.range is None:
                raise errors.InvalidParameter("invert: this model takes records, which have no dark and light")
            if len(body.data) > INLINE_BYTES:
                return read_aside(body, model, invert, limits)
            return bring(read_items(body, spec, limits, masked=masked), model, invert)

        async def read_aside(body: Body, model: Model, invert: bool | None, limits: Limits) -> Items:
            spec = model.served.manifest.input
            found = bring(
                await decode(lambda _: read_items(body, spec, limits, masked=masked), model.terms), model, invert
            )
            return found if isinstance(found, Items) else await found

        def bring(found: ReadItems, model: Model, invert: bool | None) -> Items | Awaitable[Items]:
            spec, pixels = model.served.manifest.input, found.pixels
            if pixels:
                # Decoding may cost more than the forward pass: not for what the queue has no room for.
                model.served.check_room(capability, len(found.entries))
            if pixels > INLINE_PIXELS:
                return decode(lambda check: bring_to_input(found, spec, invert=invert, check=check), model.terms)
            return bring_to_input(found, spec, invert=invert)

        declare = self._declare(
            path,
            capability=capability,
            answers=answers,
            query=query,
            read=read,
            also=also,
            shows_pictures=shows_pictures,
            request_body=MASKED_BODY if masked else ITEMS_BODY,
            body_required=True,
            raises=(*COMMON_ERRORS, errors.ImageNotDecodable),
        )

        def decorate(
            endpoint: Callable[[Items, Model, QueryT], Awaitable[Results]],
        ) -> Callable[..., Awaitable[Results]]:
            if by_item:
                summary = summary_of(endpoint)
                self.item_routes.append(ItemsRoute(path, capability, answers, query, endpoint, masked, summary))
            return declare(endpoint)

        return decorate

    def body(
        self,
        path: str,
        *,
        capability: Capability,
        answers: type[BaseModel],
        request_body: dict[str, Any],
        body_required: bool = True,
        beside: dict[str, Any] | None = None,
    ) -> Callable[[Callable[[Content, Model, ModelQuery], Awaitable[Results]]], Callable[..., Awaitable[Results]]]:
        """Declares `endpoint(content, model, query)` at POST `path`, for bodies that hold something else than items."""

        def read(body: Body, _model: Model, _query: ModelQuery, limits: Limits) -> Content:
            return Content(body, limits)

        return self._declare(
            path,
            capability=capability,
            answers=answers,
            query=ModelQuery,
            read=read,
            request_body=request_body,
            body_required=body_required,
            beside=beside,
            raises=COMMON_ERRORS,
        )

    def _declare(
        self,
        path: str,
        *,
        capability: Capability,
        answers: type[BaseModel],
        query: type[QueryT],
        read: Callable[[Body, Model, QueryT, Limits], Items | Content | Awaitable[Items]],
        request_body: dict[str, Any],
        body_required: bool,
        raises: Sequence[type[errors.ServiceError]],
        also: tuple[Capability, ...] = (),
        beside: dict[str, Any] | None = None,
        shows_pictures: bool = True,
    ) -> Callable[[Callable[[Any, Model, QueryT], Awaitable[Results]]], Callable[..., Awaitable[Results]]]:
        needed = (capability, *also)

        def decorate(endpoint: Callable[[Any, Model, QueryT], Awaitable[Results]]) -> Callable[..., Awaitable[Results]]:
            async def handle(request: Request) -> Response:
                scope = request.scope
                services: Services = scope["app"].state
                headers = headers_of(scope)
                parameters = parse_query(query, scope["query_string"])
                served = services.catalog.find(parameters.model, *needed)
                accept = headers.get(b"accept", b"").decode("latin-1")
                manifest = served.manifest
                shows = shows_pictures and manifest.input.picture is not None
                media_type = _negotiated(accept, _WITH_PICTURES if shows else _WITHOUT_PICTURES)
                terms = read_terms(scope, headers, services.settings, services.loop)
                model = Model(served, terms, shows_picture=media_type == PNG)
                counted = services.metrics.inference(manifest.name, manifest.version)
                with counted:
                    served.check_room(capability)  # where there is none, not even the body is read
                    started = time.perf_counter()
                    with InFlight(services.deadlines, scope, terms) as in_flight:
                        body = await read_body(request, headers, services.settings.max_body_bytes)
                        in_flight.body_is_read(request.receive)
                        given = read(body, model, parameters, services.limits)
                        if not isinstance(given, Items | Content):
                            given = await given
                        decoded = time.perf_counter()
                        results = await endpoint(given, model, parameters)
                    ids = given.ids if isinstance(given, Items) else None
                    ran = time.perf_counter()
                    response = encode_results(results, model, media_type, as_png=parameters.images == "png", ids=ids)
                    counted.items = len(results)
                    counted.decode_s, counted.encode_s = decoded - started, time.perf_counter() - ran
                response.raw_headers += [
                    (b"x-model", served.name_header),
                    (b"server-timing", model.server_timing(counted.decode_s, counted.encode_s)),
                ]
                return response

            self.hot[path] = handle
            handle.__name__, handle.__doc__ = endpoint.__name__, endpoint.__doc__
            self.add_api_route(
                path,
                handle,
                methods=["POST"],
                summary=summary_of(endpoint),
                response_model=_answer_model(answers, beside or {}),
                responses={200: _other_answers(shows_pictures), **problem_responses(raises)},
                openapi_extra={
                    "parameters": [*query_parameters(query), *HEADER_PARAMETERS],
                    "requestBody": {"required": body_required, "content": request_body},
                },
                route_class_override=RawRoute,
            )
            return endpoint

        return decorate


def _negotiated(accept: str, offered: tuple[str, ...]) -> str:
    """The offered media type that the caller likes best. Raises NotAcceptable."""
    media_type = preferred_media_type(accept, offered)
    if media_type is None:
        expected = " or ".join(kind for kind in offered if kind != HTML)
        raise errors.NotAcceptable(f"accept: expected {expected}, found {accept!r}")
    return media_type


def summary_of(endpoint: Callable[..., Any]) -> str:
    """The first line of an endpoint's docstring."""
    return (endpoint.__doc__ or "").strip().splitlines()[0].rstrip(".")


def query_invert(query: ModelQuery) -> bool | None:
    """The `invert` parameter of a query that may have one."""
    return query.invert if isinstance(query, ItemsQuery) else None


@lru_cache(maxsize=1024)
def parse_query(query: type[QueryT], query_string: bytes) -> QueryT:
    """The query string's parameters. Raises InvalidParameter for an unknown, repeated or bad one."""
    pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)
    values = dict(pairs)
    if len(values) != len(pairs):
        raise errors.InvalidParameter("query: a parameter is given more than once")
    try:
        return query.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(query.model_fields)
            raise errors.InvalidParameter(f"{name}: unknown parameter; this route knows {known}") from error
        raise errors.InvalidParameter(f"{name}: {first['msg']}, found {first['input']!r}") from error


def encode_results(results: Results, model: Model, media_type: str, *, as_png: bool, ids: list[Any] | None) -> Answer:
    """The answer in that media type, which must be one that the results have."""
    spec = model.manifest.input
    if media_type == NPY:
        return Answer(encode_npy(results.array), NPY.encode())
    if results.pictures is not None and spec.range is not None and media_type == PNG:
        return Answer(encode_png(np.asarray(results.columns[results.pictures]), spec.range, ids), PNG.encode())
    rows = result_rows(results, spec, as_png=as_png, ids=ids)
    answer = {"model": model.manifest.name, "version": model.manifest.version, **results.beside, "results": rows}
    return Answer(encode_json(answer), JSON.encode())


def result_rows(
    results: Results, spec: InputSpec, *, as_png: bool, ids: list[Any] | None = None
) -> list[dict[str, Any]]:
    """One object per item; with `as_png` pictures are base64 PNG files in it."""
    columns = results.columns
    if as_png and results.pictures is not None and spec.range is not None:
        arrays = np.asarray(columns[results.pictures])
        pictures = [base64.b64encode(encode_png(array[np.newaxis], spec.range)).decode() for array in arrays]
        columns = {**columns, results.pictures: pictures}
    if ids is not None:
        columns = {"id": ids, **columns}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]  # noqa: B905  as many
    if shared := results.shared:
        for row in rows:
            row.update(shared)
    return rows


def _answer_model(answers: type[BaseModel], beside: dict[str, Any]) -> type[BaseModel]:
    """The schema of the whole answer around one item's schema."""
    return create_model(
        f"{answers.__name__}Answer",
        __doc__=f"One `{answers.__name__}` per item, in the order of the items.",
        model=(str, Field(description="Name of the model that answered.")),
        version=(int, Field(description="Its version.")),
        **beside,
        results=(list[answers], Field(description="In the order of the items.")),  # type: ignore[valid-type]  # a class, made as this runs
    )


def query_parameters(query: type[ModelQuery]) -> list[dict[str, Any]]:
    """The OpenAPI parameters of a query model."""
    properties = query.model_json_schema()["properties"]
    parameters = []
    for name, schema in properties.items():
        plain = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
        shown = {key: value for key, value in plain[0].items() if key not in ("title", "description")}
        parameters.append(
            {"name": name, "in": "query", "required": False, "description": schema["description"], "schema": shown}
        )
    return parameters


HEADER_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "required": False,
        "description": "Milliseconds until a 504, the time in the queue included.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 600_000},
    },
    {
        "name": "X-Request-Priority",
        "in": "header",
        "required": False,
        "description": "Higher ones leave the queue first; 0 if absent.",
        "schema": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "required": False,
        "description": "Echoed in the answer; drawn if absent.",
        "schema": {"type": "string", "maxLength": 128},
    },
]

_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _other_answers(shows_pictures: bool) -> dict[str, Any]:
    """The OpenAPI response for a success, beside its JSON schema."""
    picture = "with `Accept: image/png` a picture (several items: one labelled grid), " if shows_pictures else ""
    return {
        "description": f"One result per item; {picture}with `Accept: application/x-npy` the main array.",
        "headers": {
            "X-Model": {"schema": {"type": "string"}, "description": "name:version of the model that answered."},
            "X-Request-Id": {"schema": {"type": "string"}},
            "Server-Timing": {"schema": {"type": "string"}},
        },
        "content": dict.fromkeys((PNG, NPY) if shows_pictures else (NPY,), _BINARY),
    }


_SEVEN = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAAARklEQVR42mNgGGSAEc56hhCUgtJM2HQ8"
    "wyeJaSySNilidDLh0UiaTmSNJNqJpBFd8hkBnTglUZxDik40jcTrRNeIX+egAwAyWAkJ6juSWwAAAABJ"
    "RU5ErkJggg=="
)
"""A picture of 28 × 28 pixels, as base64; a model of any other size takes it too."""

ITEMS_BODY: dict[str, Any] = {
    JSON: {
        "examples": {"a picture": {"value": {"instances": [{"b64": _SEVEN}], "ids": ["seven"]}}},
        "schema": {
            "type": "object",
            "required": ["instances"],
            "additionalProperties": False,
            "properties": {
                "instances": {
                    "type": "array",
                    "minItems": 1,
                    "description": "Items: numbers nested in the model's input shape, or flat; or "
                    '{"b64": "<picture file>"}; or for records an object by feature name.',
                    "items": {
                        "oneOf": [
                            {"type": "array", "items": {}},
                            {
                                "type": "object",
                                "properties": {"b64": {"type": "string", "format": "byte"}},
                            },
                        ]
                    },
                },
                "ids": {
                    "type": "array",
                    "items": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
                    "description": "One per item, echoed as `id` in the results.",
                },
            },
        },
    },
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            "description": "One or more picture files under any field name.",
        }
    },
    "image/png": _BINARY,
    "image/jpeg": _BINARY,
    "image/webp": _BINARY,
    "image/bmp": _BINARY,
    "image/tiff": _BINARY,
    NPY: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "float16, float32, float64 or uint8: one item, (n, *shape) or (n, flat).",
        }
    },
}

_JSON_MASKS = {
    "type": "array",
    "minItems": 1,
    "description": "One for all items or one for each: height × width numbers, 1 = missing, or "
    '{"b64": "<picture file>"}, light = missing.',
    "items": {},
}
MASKED_BODY: dict[str, Any] = {
    JSON: {
        "schema": {
            **ITEMS_BODY[JSON]["schema"],
            "required": ["instances", "masks"],
            "properties": {**ITEMS_BODY[JSON]["schema"]["properties"], "masks": _JSON_MASKS},
        }
    },
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["mask"],
            "properties": {
                "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                "mask": {"type": "array", "items": {"type": "string", "format": "binary"}},
            },
            "description": "Picture files under any field name, and masks, light = missing, as parts named `mask`: "
            "one for all pictures or one for each.",
        }
    },
}
