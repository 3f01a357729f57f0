"""Inference in the Open Inference Protocol v2 over HTTP, with binary tensors: what KServe and Triton clients speak.

Every output is one that a capability answers; only those asked for are computed.
"""

from __future__ import annotations

import asyncio
import gzip
import math
import re
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel

from app import errors
from app.api.dependencies import MAX_PRIORITY, MAX_TIMEOUT_MS, Model, Terms, headers_of, read_body, read_terms
from app.api.envelope import HotPattern
from app.api.in_flight import InFlight
from app.api.responses import Answer
from app.api.routing import COMMON_ERRORS, HEADER_PARAMETERS, ItemsQuery, RawRoute, Results, parse_query
from app.api.services import services_of
from app.artifacts.manifest import Capability, Manifest
from app.artifacts.pictures import pixels_to_range
from app.capabilities.anomaly_score import AnomalyQuery, anomaly_score, heatmaps
from app.capabilities.decode import decode_latents
from app.capabilities.denoise import denoise
from app.capabilities.encode import EncodeQuery, encode
from app.capabilities.inpaint import inpaint
from app.capabilities.reconstruct import reconstruct, reconstructions
from app.capabilities.sample import SampleRequest, draw
from app.codecs.bodies import Body
from app.codecs.items import Items, check_rows
from app.codecs.tensors import DATATYPES, HEADER_LENGTH, InferRequest, Tensor, encode_infer_answer, parse_infer_request
from app.protocols.open_inference_routes import NAME, TAG, VERSION, find_model, responses_of
from app.served_model import ServedModel

router = APIRouter(tags=[TAG])

_INPUT, _MASK, _LATENT = "input", "mask", "latent"
_IGNORED_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end")
_INLINE_BYTES = 128 * 1024  # below it, compressing costs less than handing it to another thread


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that a model takes or gives, its shape without the batch axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Output(TensorEntry):
    """An output: which capability answers it, in which column of its results, and the inputs that this needs."""

    capability: Capability
    column: str
    needs: tuple[str, ...] = (_INPUT,)

    def of(self, results: Results) -> NDArray[Any]:
        """The output's rows among a capability's results."""
        if self.column in results.columns:
            return np.asarray(results.columns[self.column])
        if self.column in results.shared:
            return np.full(len(results), results.shared[self.column])
        return np.asarray([row[self.column] for row in results.columns["components"]])


def inputs_of(manifest: Manifest) -> tuple[TensorEntry, ...]:
    """What a model takes: `input`, and whatever else its capabilities need."""
    inputs = [TensorEntry(_INPUT, "FP32", manifest.input.shape)]
    if Capability.INPAINT in manifest.capabilities:
        inputs.append(TensorEntry(_MASK, "FP32", manifest.input.mask_shape))
    if Capability.DECODE in manifest.capabilities:
        inputs.append(TensorEntry(_LATENT, "FP32", manifest.capabilities[Capability.DECODE].inputs[0].shape))
    return tuple(inputs)


def outputs_of(manifest: Manifest) -> tuple[Output, ...]:
    """What a model gives, by what it can do."""
    shape = manifest.input.shape
    latent = (manifest.latent_dim or 0,)
    score = Capability.ANOMALY_SCORE
    parts = manifest.components if score in manifest.capabilities else ()
    places = manifest.input.mask_shape[1:] or manifest.input.mask_shape
    known = (
        Output("latent", "FP32", latent, Capability.ENCODE, "latent"),
        Output("reconstruction", "FP32", shape, Capability.RECONSTRUCT, "reconstruction"),
        Output("reconstruction_error", "FP64", (), Capability.RECONSTRUCT, "reconstruction_error"),
        Output("denoised", "FP32", shape, Capability.DENOISE, "denoised"),
        Output("anomaly_score", "FP32", (), score, "score"),
        Output("p_value", "FP64", (), score, "p_value"),
        Output("is_anomaly", "BOOL", (), score, "is_anomaly"),
        Output("threshold", "FP32", (), score, "threshold"),
        *(Output(part, "FP32", (), score, part) for part in parts),
        Output("heatmap", "FP32", places, Capability.ANOMALY_MAP, "heatmap"),
        Output("inpainted", "FP32", shape, Capability.INPAINT, "inpainted", (_INPUT, _MASK)),
        Output("decoded", "FP32", shape, Capability.DECODE, "reconstruction", (_LATENT,)),
        Output("sample", "FP32", shape, Capability.SAMPLE, "sample", ()),
    )
    return tuple(output for output in known if output.capability in manifest.capabilities)


@dataclass(frozen=True)
class _Given:
    """A request's tensors as the capabilities take them, and its parameters."""

    items: Items | None
    latents: NDArray[np.float32] | None
    anomaly: AnomalyQuery
    sample: SampleRequest


async def infer(request: Request) -> Response:
    """Answer the outputs that are asked for; without names all that need no more than `input`."""
    scope, services = request.scope, services_of(request)
    headers, settings = headers_of(scope), services.settings
    served = find_model(request)
    terms = read_terms(scope, headers, settings, services.loop)
    counted = services.metrics.inference(served.manifest.name, served.manifest.version)
    with counted:
        started = time.perf_counter()
        with InFlight(services.deadlines, scope, terms) as in_flight:
            body = await read_body(request, headers, settings.max_body_bytes)
            in_flight.body_is_read(request.receive)
            wants_json = headers.get(b"accept", b"").startswith(b"application/json")
            found = _read(body, headers, served, as_json=wants_json)
            model = Model(served, _terms_of(found, terms))
            outputs = _chosen(found, served)
            given = _given(found, served.manifest, settings.max_queue_rows)
            decoded = time.perf_counter()
            results = await _run(outputs, given, model)
        ran = time.perf_counter()
        asked = {output.name: output.binary for output in found.outputs or ()}
        tensors = []
        for output in outputs:
            binary = asked.get(output.name)
            values = output.of(results[output.capability])
            tensors.append((Tensor(output.name, output.datatype, values), found.binary if binary is None else binary))
        answer: dict[str, Any] = {
            "model_name": served.manifest.name,
            "model_version": str(served.manifest.version),
            "id": found.id,
        }
        if Capability.SAMPLE in results:
            answer["parameters"] = {"seed": results[Capability.SAMPLE].beside["seed"]}
        data, header_length = encode_infer_answer(answer, tensors)
        response = await _response(data, header_length, headers.get(b"accept-encoding", b""))
        counted.items = len(tensors[0][0].values)
        counted.decode_s, counted.encode_s = decoded - started, time.perf_counter() - ran
    response.raw_headers += [
        (b"x-model", served.name_header),
        (b"server-timing", model.server_timing(counted.decode_s, counted.encode_s)),
    ]
    return response


HOT_PATTERN = HotPattern(
    re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer"),
    "/v2/models/{name}/infer",
    infer,
)


@dataclass(frozen=True)
class _Offer:
    """What a model gives by name, and which data types it takes for each input."""

    outputs: dict[str, Output]
    takes: dict[str, Sequence[str]]


_OFFERS: WeakKeyDictionary[ServedModel, _Offer] = WeakKeyDictionary()


def _offer_of(served: ServedModel) -> _Offer:
    """The model's offer; put together once, for it costs more than most requests."""
    offer = _OFFERS.get(served)
    if offer is None:
        manifest = served.manifest
        takes: dict[str, Sequence[str]] = {tensor.name: ("FP32",) for tensor in inputs_of(manifest)}
        if manifest.input.picture is not None:
            takes[_INPUT] = ("FP32", "UINT8")
        if _MASK in takes:
            takes[_MASK] = ("FP32", "UINT8", "BOOL")
        offer = _OFFERS[served] = _Offer({output.name: output for output in outputs_of(manifest)}, takes)
    return offer


def _read(body: Body, headers: dict[bytes, bytes], served: ServedModel, *, as_json: bool) -> InferRequest:
    """The request in a body, raw ones included: those are the bytes of one `input` and nothing else."""
    header = headers.get(HEADER_LENGTH.lower().encode())
    length = None if header is None else header.decode("latin-1")
    if length == "0":
        manifest = served.manifest
        picture = manifest.input.picture is not None
        shape, size = manifest.input.shape, manifest.input.size
        datatype, dtype = "FP32", DATATYPES["FP32"]
        if picture and len(body.data) == size:
            datatype, dtype = "UINT8", DATATYPES["UINT8"]
        if len(body.data) != size * dtype.itemsize:
            sizes = f"{size * 4}" + (f" or {size}" if picture else "")
            raise errors.MalformedPayload(
                f"input: unexpected size for input: a raw request is one item of {sizes} bytes, found {len(body.data)}"
            )
        values = np.frombuffer(body.data, dtype).reshape(1, *shape)
        return InferRequest({_INPUT: Tensor(_INPUT, datatype, values)}, binary=not as_json)
    return parse_infer_request(body.data, length, _offer_of(served).takes)


def _terms_of(found: InferRequest, terms: Terms) -> Terms:
    """The request's terms with what its parameters say: `timeout` in microseconds, and `priority`, 1 the highest."""
    if not found.parameters:
        return terms
    timeout = _unsigned(found, "timeout")
    priority = _unsigned(found, "priority")
    deadline, timeout_ms = terms.deadline, terms.timeout_ms
    if timeout:
        if timeout > MAX_TIMEOUT_MS * 1000:
            raise errors.InvalidParameter(
                f"timeout: expected at most {MAX_TIMEOUT_MS * 1000} microseconds, found {timeout}"
            )
        deadline = min(deadline, terms.deadline - terms.timeout_ms / 1e3 + timeout / 1e6)
        timeout_ms = min(timeout_ms, math.ceil(timeout / 1000))
    priority = max(0, MAX_PRIORITY + 1 - priority) if priority else terms.priority
    return replace(terms, timeout_ms=timeout_ms, deadline=deadline, priority=priority)


def _unsigned(found: InferRequest, name: str) -> int:
    value = found.parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**64:
        raise errors.InvalidParameter(f"{name}: expected an integer ≥ 0, found {value!r}")
    return value


def _chosen(found: InferRequest, served: ServedModel) -> list[Output]:
    """The outputs to answer. Raises InvalidInput for an unknown one, or one whose inputs are missing."""
    by_name = _offer_of(served).outputs
    if found.outputs is None:
        chosen = [output for output in by_name.values() if output.needs == (_INPUT,)]
        if not chosen:
            names = ", ".join(by_name)
            raise errors.InvalidInput(f"outputs: none needs only {_INPUT} here; name one or more of {names}")
    else:
        for wanted in found.outputs:
            if wanted.name not in by_name:
                raise errors.InvalidInput(
                    f"outputs: {served.manifest.name} has {', '.join(by_name)}; found {wanted.name!r}"
                )
        chosen = [by_name[wanted.name] for wanted in found.outputs]
    for output in chosen:
        for needed in output.needs:
            if needed not in found.inputs:
                raise errors.InvalidInput(f"inputs: {needed} is missing, which {output.name} needs")
    return chosen


_PLAIN_QUERY, _PLAIN_ITEMS, _PLAIN_SAMPLE = AnomalyQuery(), ItemsQuery(), SampleRequest()


def _given(found: InferRequest, manifest: Manifest, max_rows: int) -> _Given:
    """The tensors as the capabilities take them. Raises ShapeMismatch, InvalidInput, InvalidParameter and more."""
    sample, target_fpr = _own_parameters(found.parameters)
    given = found.inputs
    items = latents = None
    if _INPUT in given:
        values = _rows(given[_INPUT], manifest.input.shape, max_rows)
        if values.dtype == np.uint8:
            values = pixels_to_range(values, manifest.input)
        else:
            check_rows(values, manifest.input.range)
        items = Items(values, masks=_masks(given[_MASK], manifest, len(values)) if _MASK in given else None)
    if _LATENT in given:
        latents = _rows(given[_LATENT], manifest.capabilities[Capability.DECODE].inputs[0].shape, max_rows)
        check_rows(latents, None)
    return _Given(items, latents, _PLAIN_QUERY if target_fpr is None else _anomaly_query(target_fpr), sample)


def _own_parameters(parameters: dict[str, Any]) -> tuple[SampleRequest, Any]:
    """What `/sample` and `/anomaly-score` take, from among a request's parameters. Raises InvalidParameter."""
    if not parameters:
        return _PLAIN_SAMPLE, None
    for name, value in parameters.items():
        if name in _IGNORED_PARAMETERS and not value:
            continue
        if name not in ("timeout", "priority", "binary_data_output", "target_fpr", *SampleRequest.model_fields):
            raise errors.InvalidParameter(f"parameters: {name!r} is none that this service knows, or has an effect on")
    drawn = {name: value for name, value in parameters.items() if name in SampleRequest.model_fields}
    return SampleRequest.parse(drawn), parameters.get("target_fpr")


def _anomaly_query(target_fpr: object) -> AnomalyQuery:
    if type(target_fpr) not in (int, float):
        raise errors.InvalidParameter(f"target_fpr: expected a number, found {target_fpr!r}")
    query: AnomalyQuery = parse_query(AnomalyQuery, f"target_fpr={target_fpr}".encode())
    return query


def _rows(tensor: Tensor, shape: tuple[int, ...], max_rows: int) -> NDArray[Any]:
    """A tensor as (n, *shape). Raises ShapeMismatch, InvalidInput and PayloadTooLarge."""
    values = tensor.values
    if values.shape[1:] not in (shape, (math.prod(shape),)):
        expected, found = [-1, *shape], list(values.shape)
        raise errors.ShapeMismatch(f"{tensor.name}: unexpected shape for input: expected {expected}, found {found}")
    if not len(values):
        raise errors.InvalidInput(f"{tensor.name}: expected at least one item, found none")
    if len(values) > max_rows:
        raise errors.PayloadTooLarge(f"{tensor.name}: expected at most {max_rows} items, found {len(values)}")
    return values.reshape(len(values), *shape)


def _masks(tensor: Tensor, manifest: Manifest, items: int) -> NDArray[np.float32]:
    masks = _rows(tensor, manifest.input.mask_shape, items).astype(np.float32)
    if not np.isin(masks, (0, 1)).all():
        raise errors.InvalidInput("mask: expected 0 where a value is known and 1 where it is missing, found others")
    if len(masks) not in (1, items):
        raise errors.ShapeMismatch(f"mask: expected one for all or one for each of {items} items, found {len(masks)}")
    return np.broadcast_to(masks, (items, *masks.shape[1:]))


_Answer = Callable[[_Given, Model, list[str]], Awaitable[Results]]
"""Results with at least the columns that are named."""


def _on_items(endpoint: Callable[[Items, Model, Any], Awaitable[Results]], query: ItemsQuery) -> _Answer:
    async def answer(given: _Given, model: Model, _columns: list[str]) -> Results:
        return await endpoint(cast("Items", given.items), model, query)

    return answer


async def _reconstruct(given: _Given, model: Model, columns: list[str]) -> Results:
    items = cast("Items", given.items)
    if columns != ["reconstruction"]:
        return await reconstruct(items, model, _PLAIN_ITEMS)
    values = await reconstructions(items, model)
    return Results({"reconstruction": values}, main=values)


async def _score(given: _Given, model: Model, _columns: list[str]) -> Results:
    return await anomaly_score(cast("Items", given.items), model, given.anomaly)


async def _map(given: _Given, model: Model, _columns: list[str]) -> Results:
    maps = await heatmaps(cast("Items", given.items), model)
    maps = maps[:, 0] if maps.ndim == 4 else maps  # (n, height, width), or (n, features)
    return Results({"heatmap": maps}, main=maps)


async def _decode(given: _Given, model: Model, _columns: list[str]) -> Results:
    return await decode_latents(cast("NDArray[np.float32]", given.latents), model)


async def _sample(given: _Given, model: Model, _columns: list[str]) -> Results:
    return await draw(given.sample, model)


_ANSWERS: dict[Capability, _Answer] = {
    Capability.ENCODE: _on_items(encode, EncodeQuery()),
    Capability.RECONSTRUCT: _reconstruct,
    Capability.DENOISE: _on_items(denoise, _PLAIN_ITEMS),
    Capability.INPAINT: _on_items(inpaint, _PLAIN_ITEMS),
    Capability.ANOMALY_SCORE: _score,
    Capability.ANOMALY_MAP: _map,
    Capability.DECODE: _decode,
    Capability.SAMPLE: _sample,
}


async def _run(outputs: list[Output], given: _Given, model: Model) -> dict[Capability, Results]:
    """The results of each output's capability, all of them waiting at once; the first that fails fails the request."""
    columns: dict[Capability, list[str]] = {}
    for output in outputs:
        columns.setdefault(output.capability, []).append(output.column)
    if len(columns) == 1:
        ((capability, names),) = columns.items()
        return {capability: await _ANSWERS[capability](given, model, names)}
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {
                capability: group.create_task(
                    cast("Coroutine[Any, Any, Results]", _ANSWERS[capability](given, model, names))
                )
                for capability, names in columns.items()
            }
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return {capability: task.result() for capability, task in tasks.items()}


async def _response(data: bytes, header_length: int | None, accept_encoding: bytes) -> Answer:
    """The body as a response, compressed where the caller accepts one coding alone.

    HTTP libraries name several on every request, whoever uses them; compressing tensors costs more than inferring them.
    """
    headers = [] if header_length is None else [(HEADER_LENGTH.encode(), b"%d" % header_length)]
    coding = accept_encoding.strip().lower().decode("latin-1")
    if coding in ("gzip", "deflate"):
        compress = partial(gzip.compress, mtime=0) if coding == "gzip" else zlib.compress
        if len(data) <= _INLINE_BYTES:
            data = compress(data, 1)
        else:
            data = await anyio.to_thread.run_sync(compress, data, 1)
        headers.append((b"content-encoding", coding.encode()))
    answer = Answer(data, b"application/json" if header_length is None else b"application/octet-stream")
    answer.raw_headers += headers
    return answer


class InferAnswer(BaseModel):
    """The outputs that were asked for."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any] | None = None
    outputs: list[dict[str, Any]]


_TENSORS_IN = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"type": "string", "enum": [_INPUT, _MASK, _LATENT]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"type": "string", "enum": ["FP32", "UINT8", "BOOL"]},
            "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
            "data": {"type": "array", "items": {}, "description": "Flat in row-major order, or nested."},
        },
    },
}
_LATENT_IN = {"name": _LATENT, "shape": [1, 16], "datatype": "FP32", "data": [0.5, -0.5] * 8}
_INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "examples": {
                "decode a latent vector, as mnist-variational can": {
                    "value": {"inputs": [_LATENT_IN], "outputs": [{"name": "decoded"}]}
                },
                "draw samples, as mnist-variational can": {
                    "value": {
                        "id": "two",
                        "inputs": [],
                        "outputs": [{"name": "sample"}],
                        "parameters": {"seed": 7, "count": 2, "timeout": 5_000_000},
                    }
                },
            },
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": {
                        "type": "object",
                        "description": "`timeout` in microseconds, `priority` (1 is the highest), `target_fpr`, "
                        "`seed`, `count`, `temperature`, `label`, `binary_data_output`.",
                    },
                    "inputs": _TENSORS_IN,
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                        },
                    },
                },
            },
        },
        "application/octet-stream": {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": f"The JSON, as long as the header {HEADER_LENGTH} says, then the tensors whose "
                "`binary_data_size` it gives. Length 0: the bytes of one `input` alone.",
            }
        },
    },
}

for _path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
    router.add_api_route(
        _path,
        infer,
        methods=["POST"],
        summary="Infer" + (" with one version" if "{version}" in _path else ""),
        response_model=InferAnswer,
        responses={
            200: {
                "description": f"The outputs; binary ones behind the JSON, whose length {HEADER_LENGTH} gives.",
                "headers": {
                    HEADER_LENGTH: {"schema": {"type": "string"}},
                    "X-Model": {"schema": {"type": "string"}},
                    "X-Request-Id": {"schema": {"type": "string"}},
                    "Server-Timing": {"schema": {"type": "string"}},
                },
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            },
            **responses_of(error for error in COMMON_ERRORS if error not in (errors.NotAcceptable, errors.NoModels)),
        },
        openapi_extra={
            "parameters": [
                *(entry for entry in (NAME, VERSION) if f"{{{entry['name']}}}" in _path),
                *HEADER_PARAMETERS,
            ],
            "requestBody": _INFER_BODY,
        },
        route_class_override=RawRoute,
    )
