"""What the Open Inference Protocol tells of the server and of each model: metadata, health, configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app import __version__
from app.api.errors import Problem, problem_body
from app.api.health import livez
from app.api.responses import json_response
from app.api.services import services_of
from app.protocols.open_inference import TensorEntry, inputs_of, outputs_of
from app.protocols.open_inference_routes import FINDING, TAG, find_model, get

router = APIRouter(tags=[TAG])

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
PLATFORM, BACKEND = "pytorch_torchscript", "pytorch"
_TYPES_IN_CONFIG = {"FP32": "TYPE_FP32", "FP64": "TYPE_FP64", "BOOL": "TYPE_BOOL"}


class ServerMetadata(BaseModel):
    """Which server this is."""

    name: str
    version: str
    extensions: list[str]


class V2Live(BaseModel):
    """The event loop answers."""

    live: bool


class V2Ready(BaseModel):
    """Requests will be answered."""

    ready: bool
    live: bool


class V2ModelReady(BaseModel):
    """Requests for this model will be answered."""

    name: str
    ready: bool


class V2Models(BaseModel):
    """Names of all models."""

    models: list[str]


class TensorMetadata(BaseModel):
    """A tensor's name, data type and shape, -1 for the batch axis."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class V2Config(BaseModel):
    """A model's configuration in Triton's form."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]
    dynamic_batching: dict[str, Any]


@get(router, "/v2", ServerMetadata, "Server metadata")
async def server_metadata() -> Response:
    """Name, version and the protocol's extensions that are spoken here."""
    return json_response({"name": "hourglass", "version": __version__, "extensions": EXTENSIONS})


@get(
    router,
    "/v2/health/live",
    V2Live,
    "Live",
    responses={503: {"model": Problem, "description": "`internal`"}},
)
async def live(request: Request) -> Response:
    """200 while the event loop answers and the threads that watch over it live."""
    return await livez(request)


@get(
    router,
    "/v2/health/ready",
    V2Ready,
    "Ready",
    responses={503: {"model": Problem, "description": "`not_ready`"}},
)
async def ready(request: Request) -> Response:
    """200 once every required model, and at least one, is served; else 503 with the reasons."""
    reasons = services_of(request).fleet.reasons_not_ready()
    if not reasons:
        return json_response({"ready": True, "live": True})
    body = problem_body(
        "not ready: " + "; ".join(reasons), "not_ready", request.scope["request_id"], ready=False, live=True
    )
    return Response(body, status_code=503, media_type="application/json", headers={"Retry-After": "1"})


@get(router, "/v2/models", V2Models, "Names of all models")
async def list_names(request: Request) -> Response:
    """The name of every model of the store."""
    return json_response({"models": sorted({name for name, _ in services_of(request).fleet.versions()})})


@get(router, "/v2/models/{name}", ModelMetadata, "A model's metadata", FINDING)
async def model_metadata(request: Request) -> Response:
    """Names, data types and shapes of what the model takes and gives; all inputs but `input` are optional."""
    manifest = find_model(request).manifest
    versions = [str(number) for name, number in sorted(services_of(request).fleet.versions()) if name == manifest.name]

    def tensors(entries: Iterable[TensorEntry]) -> list[dict[str, Any]]:
        return [{"name": e.name, "datatype": e.datatype, "shape": [-1, *e.shape]} for e in entries]

    return json_response(
        {
            "name": manifest.name,
            "versions": versions,
            "platform": PLATFORM,
            "inputs": tensors(inputs_of(manifest)),
            "outputs": tensors(outputs_of(manifest)),
        }
    )


@get(router, "/v2/models/{name}/ready", V2ModelReady, "A model is ready", FINDING)
async def model_ready(request: Request) -> Response:
    """200 if requests for the model will be answered, else the reason why not."""
    return json_response({"name": find_model(request).manifest.name, "ready": True})


@get(router, "/v2/models/{name}/config", V2Config, "A model's configuration", FINDING)
async def model_config(request: Request) -> Response:
    """The model's configuration in Triton's form, for clients that plan by it."""
    manifest = find_model(request).manifest

    def tensors(entries: Iterable[TensorEntry]) -> list[dict[str, Any]]:
        return [{"name": e.name, "data_type": _TYPES_IN_CONFIG[e.datatype], "dims": list(e.shape)} for e in entries]

    inputs = tensors(inputs_of(manifest))
    for optional in inputs[1:]:
        optional["optional"] = True
    return json_response(
        {
            "name": manifest.name,
            "platform": PLATFORM,
            "backend": BACKEND,
            "max_batch_size": manifest.max_batch_size,
            "input": inputs,
            "output": tensors(outputs_of(manifest)),
            "dynamic_batching": {},
        }
    )
