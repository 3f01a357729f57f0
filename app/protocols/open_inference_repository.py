"""The Open Inference Protocol's model repository: its index, and model control for those who may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app import errors
from app.api.dependencies import headers_of, read_body, read_terms
from app.api.in_flight import InFlight
from app.api.responses import json_response
from app.api.services import services_of
from app.codecs.bodies import parse_json
from app.fleet import VersionState
from app.protocols.open_inference_routes import FINDING, NAME, TAG, responses_of

router = APIRouter(tags=[TAG])


class IndexEntry(BaseModel):
    """One version of a model in the store."""

    name: str
    version: str
    state: str = Field(description="READY, LOADING or UNAVAILABLE.")
    reason: str


_INDEX_BODY = {
    "required": False,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"ready": {"type": "boolean", "description": "`true`: only what is ready."}},
            }
        }
    },
}


@router.post(
    "/v2/repository/index",
    response_model=list[IndexEntry],
    summary="The model repository",
    responses=responses_of([errors.InvalidInput, errors.MalformedPayload, errors.PayloadTooLarge]),
    openapi_extra={"requestBody": _INDEX_BODY},
)
async def repository_index(request: Request) -> Response:
    """Every version of every model, its state and the reason for it."""
    document = await _document(request)
    if not isinstance(document, dict) or not isinstance(document.get("ready", False), bool):
        raise errors.InvalidInput('body: expected an object such as {"ready": true}')
    versions = [found for _, found in sorted(services_of(request).fleet.versions().items())]
    if document.get("ready"):
        versions = [found for found in versions if found.state == "ready"]
    return json_response([_index_entry(found) for found in versions])


_CONTROL_BODY = {
    "required": False,
    "content": {
        "application/json": {"schema": {"type": "object", "properties": {"parameters": {"type": "object"}}}},
    },
}
_CONTROL_ERRORS = responses_of(
    [
        *FINDING,
        errors.InvalidInput,
        errors.MalformedPayload,
        errors.PayloadTooLarge,
        errors.Unauthorized,
        errors.Forbidden,
        errors.AdminDisabled,
        errors.Draining,
        errors.DeadlineExceeded,
    ]
)


class Loaded(BaseModel):
    """The model is loaded."""

    name: str
    load: bool


class Unloaded(BaseModel):
    """The model is unloaded."""

    name: str
    unload: bool


async def _document(request: Request) -> Any:
    """The JSON of a body, an empty object for none. Raises MalformedPayload, PayloadTooLarge and DeadlineExceeded."""
    services, headers = services_of(request), headers_of(request.scope)
    settings = services.settings
    terms = read_terms(request.scope, headers, settings, services.loop)
    with InFlight(services.deadlines, request.scope, terms):
        body = await read_body(request, headers, settings.max_body_bytes)
    return parse_json(body.data) if body.data.strip() else {}


async def _control_body(request: Request, known: Sequence[str]) -> None:
    """Reads a body that may hold the known parameters. Raises InvalidInput, InvalidParameter and MalformedPayload."""
    document = await _document(request)
    parameters = document.get("parameters", {}) if isinstance(document, dict) else None
    if not isinstance(parameters, dict):
        raise errors.InvalidInput('body: expected an object such as {"parameters": {}}')
    if unknown := parameters.keys() - set(known):
        raise errors.InvalidParameter(
            f"parameters: {min(unknown)!r}: a model is what its artifact in the store says; it cannot be sent along"
        )


@router.post(
    "/v2/repository/models/{name}/load",
    response_model=Loaded,
    summary="Load a model of the repository",
    responses=_CONTROL_ERRORS,
    openapi_extra={"parameters": [NAME], "requestBody": _CONTROL_BODY},
)
async def repository_load(request: Request) -> Response:
    """As `POST /models/{name}/load`."""
    await _control_body(request, ())
    name = request.path_params["name"]
    await services_of(request).control.load(name, None)
    return json_response({"name": name, "load": True})


@router.post(
    "/v2/repository/models/{name}/unload",
    response_model=Unloaded,
    summary="Unload a model of the repository",
    responses=_CONTROL_ERRORS,
    openapi_extra={"parameters": [NAME], "requestBody": _CONTROL_BODY},
)
async def repository_unload(request: Request) -> Response:
    """As `POST /models/{name}/unload`."""
    await _control_body(request, ("unload_dependents",))
    name = request.path_params["name"]
    await services_of(request).control.unload(name, None)
    return json_response({"name": name, "unload": True})


def _index_entry(found: VersionState) -> dict[str, Any]:
    state = {"ready": "READY", "loading": "LOADING"}.get(found.state, "UNAVAILABLE")
    return {"name": found.name, "version": str(found.version), "state": state, "reason": found.reason or ""}
