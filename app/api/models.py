"""What the service serves: every model of the store, its versions, states and figures."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app import errors
from app.api.errors import problem_responses
from app.api.responses import Pair, json_response
from app.api.services import services_of
from app.fleet import VersionState

router = APIRouter(tags=["models"])


class VersionEntry(BaseModel):
    """One version of a model."""

    version: int
    state: str = Field(description="ready, loading, refused or unloaded.")
    reason: str | None = Field(
        description="Why it is refused or unloaded, or what is wrong with the files of one that serves on."
    )


class InputEntry(BaseModel):
    """What one item of the model looks like."""

    shape: list[int] = Field(description="(channels, height, width) of a picture, (features,) of a record.")
    range: Pair | None = Field(description="Lowest and highest value; null: any finite number.")
    features: list[str] | None = Field(None, description="Names of a record's features.")


class DriftEntry(BaseModel):
    """Recent p-values beside what they are for items like the calibration's: evenly spread."""

    items: int = Field(description="How many p-values it is about, the last ones of all workers.")
    counts: list[int] = Field(
        description="How many lie in each of 20 equal bins from 0 to 1: even while all is normal."
    )
    statistic: float = Field(description="Their distribution's largest distance from the even one, 0 to 1.")
    p_value: float = Field(description="How often normal items come to that distance or a larger: small means drift.")


class ModelEntry(BaseModel):
    """A model of the store. What stands below `versions` is the default version's; null while none is served."""

    name: str
    default_version: int | None
    versions: list[VersionEntry]
    aliases: dict[str, int] = Field(
        default_factory=dict, description="Other names of versions: `model=name:stable`. `default`: the bare name."
    )
    description: str | None = None
    capabilities: list[str] = Field(default_factory=list)
    unsupported: dict[str, str] = Field(default_factory=dict, description="What it cannot do, with the reason.")
    default_for: list[str] = Field(default_factory=list)
    labels: list[str] | None = Field(None, description="Classes that `/sample` takes as `label`.")
    input: InputEntry | None = None
    latent_dim: int | None = None
    max_batch_size: int | None = None
    calibration: dict[str, Any] | None = None
    drift: DriftEntry | None = Field(None, description="Of the default version's verdicts; null while there are none.")
    metrics: dict[str, Any] | None = Field(None, description="Measured figures with unit, protocol and baselines.")
    training: dict[str, Any] | None = Field(None, description="Preset, data, seed and configuration.")


class ModelList(BaseModel):
    """Every model of the store, by name."""

    models: list[ModelEntry]


class MapEntry(BaseModel):
    """Known items on a model's map."""

    model: str
    version: int
    method: str = Field(description="How the map was found, such as pca.")
    points: list[Pair] = Field(description="[x, y] of each known item.")
    labels: list[str | None] = Field(description="Its class, where it has one.")


# Declared by hand: FastAPI would document a 422 of its own form, which no string can cause.
_NAME_PARAMETER = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}


@router.get("/models", response_model=ModelList, summary="Every model")
async def list_models(request: Request) -> Response:
    """Every model of the store with its versions' states."""
    models = _models(request)
    return json_response({"models": [_entry(request, name, models[name]) for name in sorted(models)]})


@router.get(
    "/models/{name}",
    response_model=ModelEntry,
    summary="One model",
    responses=problem_responses([errors.ModelNotFound]),
    openapi_extra=_NAME_PARAMETER,
)
async def show_model(request: Request) -> Response:
    """One model of the store."""
    name: str = request.path_params["name"]
    models = _models(request)
    if name not in models:
        raise errors.ModelNotFound(f"model: expected one of {', '.join(sorted(models)) or 'none'}; found {name!r}")
    return json_response(_entry(request, name, models[name]))


@router.get(
    "/models/{name}/projection",
    response_model=MapEntry,
    summary="A model's map",
    responses=problem_responses([errors.ModelNotFound, errors.ModelUnavailable, errors.CapabilityNotSupported]),
    openapi_extra=_NAME_PARAMETER,
)
async def show_projection(request: Request) -> Response:
    """Known items on the map that `/encode?project=true` places others on."""
    served = services_of(request).catalog.find(request.path_params["name"])
    if served.projection is None:
        raise errors.CapabilityNotSupported(f"{served} has no map of its latent space")
    labels = served.manifest.labels or ()
    return json_response(
        {
            "model": served.manifest.name,
            "version": served.manifest.version,
            "method": served.manifest.projection and served.manifest.projection.method,
            "points": served.projection.points,
            "labels": [labels[index] if 0 <= index < len(labels) else None for index in served.projection.labels],
        }
    )


_CONTROL_PARAMETERS = {
    "parameters": [
        *_NAME_PARAMETER["parameters"],
        {
            "name": "version",
            "in": "query",
            "required": False,
            "description": "One version; without it the model as a whole.",
            "schema": {"type": "integer", "minimum": 1},
        },
    ]
}
_CONTROL_ERRORS = problem_responses(
    [
        errors.InvalidParameter,
        errors.Unauthorized,
        errors.Forbidden,
        errors.AdminDisabled,
        errors.ModelNotFound,
        errors.ModelUnavailable,
        errors.NotReady,
        errors.Draining,
    ]
)


@router.post(
    "/models/{name}/load",
    response_model=ModelEntry,
    summary="Load a model",
    responses=_CONTROL_ERRORS,
    openapi_extra=_CONTROL_PARAMETERS,
)
async def load_model(request: Request) -> Response:
    """Look at the model's folder now and serve what is there, in every worker.

    Refused versions are tried again. Without a version it also ends an unload and a rollback; with one, that version
    is kept in memory beside the highest ones.
    """
    name = request.path_params["name"]
    await services_of(request).control.load(name, _version(request))
    return await show_model(request)


@router.post(
    "/models/{name}/unload",
    response_model=ModelEntry,
    summary="Unload a model",
    responses=_CONTROL_ERRORS,
    openapi_extra=_CONTROL_PARAMETERS,
)
async def unload_model(request: Request) -> Response:
    """Give the memory of a model, or of one version, back in every worker; requests in flight finish.

    Holds until the next load, or until the service ends.
    """
    name = request.path_params["name"]
    await services_of(request).control.unload(name, _version(request))
    return await show_model(request)


@router.post(
    "/models/{name}/rollback",
    response_model=ModelEntry,
    summary="Roll a model back",
    responses=_CONTROL_ERRORS,
    openapi_extra=_CONTROL_PARAMETERS,
)
async def roll_model_back(request: Request) -> Response:
    """Let an earlier version answer to the model's name, in every worker: the one named, or the sound one before.

    Holds until the next load without a version, or until the service ends.
    """
    name = request.path_params["name"]
    await services_of(request).control.rollback(name, _version(request))
    return await show_model(request)


def _version(request: Request) -> int | None:
    """The query's version. Raises InvalidParameter."""
    parameters = request.query_params.multi_items()
    if unknown := [key for key, _ in parameters if key != "version"]:
        raise errors.InvalidParameter(f"{unknown[0]}: unknown parameter; this route knows version")
    if not parameters:
        return None
    text = parameters[0][1]
    if len(parameters) > 1 or not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text)):
        raise errors.InvalidParameter(f"version: expected one positive integer, found {text!r}")
    return int(text)


def _models(request: Request) -> dict[str, list[VersionState]]:
    """Every name with its versions, ascending, as all workers together have them."""
    models: dict[str, list[VersionState]] = {}
    states = services_of(request).fleet.versions()
    for key in sorted(states):
        models.setdefault(key[0], []).append(states[key])
    return models


def _entry(request: Request, name: str, versions: list[VersionState]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name,
        "default_version": None,
        "versions": [
            {"version": version.version, "state": version.state, "reason": version.reason} for version in versions
        ],
        "aliases": services_of(request).catalog.aliases(name),
        "capabilities": [],
        "input": None,
        "drift": None,
        "metrics": None,
    }
    served = services_of(request).catalog.default_version(name)
    if served is None:
        return entry
    manifest = served.manifest
    calibration = manifest.calibration
    drift = services_of(request).fleet.drifts().get((name, manifest.version))
    return entry | {
        "default_version": manifest.version,
        "description": manifest.description,
        "capabilities": sorted(manifest.capabilities),
        "unsupported": {str(capability): reason for capability, reason in manifest.unsupported.items()},
        "default_for": manifest.default_for,
        "labels": manifest.labels,
        "input": {
            "shape": manifest.input.shape,
            "range": manifest.input.range,
            "features": manifest.input.features,
        },
        "latent_dim": manifest.latent_dim,
        "max_batch_size": manifest.max_batch_size,
        "calibration": calibration and calibration.model_dump(exclude={"file"}),
        "drift": drift
        and {"items": drift.items, "counts": drift.counts, "statistic": drift.statistic, "p_value": drift.p_value},
        "metrics": {key: metric.model_dump() for key, metric in manifest.metrics.items()},
        # As the manifest has it: a configuration may hold integers beyond what orjson writes.
        "training": orjson.Fragment(manifest.training.model_dump_json()),
    }
