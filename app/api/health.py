"""Is the process alive, is the service ready, how far is loading, what do the metrics say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app import errors
from app.api.errors import INTERNAL, STATUS, Problem, problem_body
from app.api.responses import json_response
from app.api.services import services_of

router = APIRouter(tags=["service"])


class Live(BaseModel):
    """The event loop answers."""

    live: bool


class Ready(BaseModel):
    """Whether requests will be answered, and why not."""

    ready: bool
    reasons: list[str] = Field(description="Empty when ready.")


class NotReadyProblem(Problem):
    """Why the service is not ready."""

    ready: bool
    reasons: list[str]


class NotLiveProblem(Problem):
    """Why the process should be started anew."""

    live: bool
    reasons: list[str]


class Startup(BaseModel):
    """How far loading is."""

    done: bool
    loaded: int
    refused: int
    unloaded: int = Field(description="Sound, but not in memory, or not wanted there.")
    loading: list[str] = Field(description="Artifacts that are not loaded yet, name:version.")


Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Response]])


def _probe(path: str, *, answers: type[BaseModel], summary: str, **more: Any) -> Callable[[Endpoint], Endpoint]:
    """Declares a GET that also answers HEAD, which the document leaves out."""

    def decorate(endpoint: Endpoint) -> Endpoint:
        # The first serves both, and says so in a 405; the second is there for the document.
        router.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
        router.add_api_route(path, endpoint, methods=["GET"], response_model=answers, summary=summary, **more)
        return endpoint

    return decorate


@_probe(
    "/livez",
    answers=Live,
    summary="Alive",
    responses={503: {"model": NotLiveProblem, "description": "`internal`"}},
)
async def livez(request: Request) -> Response:
    """200 while the event loop answers and the threads that watch over it live; says nothing about models."""
    reasons = services_of(request).health.reasons_not_live
    if not reasons:
        return json_response({"live": True})
    body = problem_body(
        "not live: " + "; ".join(reasons), INTERNAL[1], request.scope["request_id"], live=False, reasons=reasons
    )
    return Response(body, status_code=503, media_type="application/json")


@_probe(
    "/readyz",
    answers=Ready,
    summary="Ready",
    responses={503: {"model": NotReadyProblem, "description": "`not_ready`, `draining`"}},
)
async def readyz(request: Request) -> Response:
    """200 if every required model, and at least one, is served and ran lately; else 503 with the reasons.

    A model that nobody asks is asked by the service itself. Overload is no reason, draining is one.
    """
    reasons = services_of(request).fleet.reasons_not_ready()
    if not reasons:
        return json_response({"ready": True, "reasons": []})
    code = STATUS[errors.Draining if services_of(request).fleet.is_draining else errors.NotReady][1]
    body = problem_body(
        "not ready: " + "; ".join(reasons), code, request.scope["request_id"], ready=False, reasons=reasons
    )
    return Response(body, status_code=503, media_type="application/json", headers={"Retry-After": "1"})


@_probe("/startupz", answers=Startup, summary="Loading progress")
async def startupz(request: Request) -> Response:
    """How many artifacts of the store are loaded, refused and still to come."""
    versions = services_of(request).fleet.versions().values()
    return json_response(
        {
            "done": services_of(request).fleet.is_loaded,
            "loaded": sum(version.state == "ready" for version in versions),
            "refused": sum(version.state == "refused" for version in versions),
            "unloaded": sum(version.state == "unloaded" for version in versions),
            "loading": [f"{version.name}:{version.version}" for version in versions if version.state == "loading"],
        }
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text format."}},
)
async def metrics(request: Request) -> Response:
    """Every metric in Prometheus' text format."""
    return Response(services_of(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
