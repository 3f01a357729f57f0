"""How the routes of the Open Inference Protocol are declared, and how a path names a model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app import errors
from app.api.errors import problem_responses
from app.api.services import services_of
from app.served_model import ServedModel

TAG = "open inference protocol"
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}
FINDING = (errors.InvalidParameter, errors.ModelNotFound, errors.NotReady, errors.ModelUnavailable)


def responses_of(raises: Iterable[type[errors.ServiceError]]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route here, where what is a 422 elsewhere is a 400."""
    documented = problem_responses(raises)
    malformed = documented.pop(422, None)
    if malformed is not None:
        documented[400]["description"] += ", " + malformed["description"]
    return documented


def get(
    router: APIRouter,
    path: str,
    answers: type[BaseModel],
    summary: str,
    raises: Iterable[type[errors.ServiceError]] = (),
    **more: Any,
) -> Callable[[Callable[..., Awaitable[Response]]], Callable[..., Awaitable[Response]]]:
    """Declares a GET that also answers HEAD, which the document leaves out; with `{name}`, for its versions too."""

    def decorate(endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        paths = [path]
        if path.startswith("/v2/models/{name}"):
            paths.append(path.replace("{name}", "{name}/versions/{version}"))
        for each in paths:
            given = [entry for entry in (NAME, VERSION) if f"{{{entry['name']}}}" in each]
            router.add_api_route(each, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
            router.add_api_route(
                each,
                endpoint,
                methods=["GET"],
                response_model=answers,
                summary=summary + (" of one version" if "{version}" in each else ""),
                responses={**responses_of(raises), **more.get("responses", {})},
                openapi_extra={"parameters": given} if given else None,
            )
        return endpoint

    return decorate


def find_model(request: Request) -> ServedModel:
    """The model of the path. Raises as `Catalog.find` does."""
    name, version = request.path_params["name"], request.path_params.get("version")
    if ":" in name:
        raise errors.ModelNotFound(f"model: a name has no colon, found {name!r}")
    return services_of(request).catalog.find(name if version is None else f"{name}:{version}")
