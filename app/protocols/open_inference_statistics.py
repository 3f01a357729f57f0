"""The Open Inference Protocol's statistics: what each model has done since the service began, over all workers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app.api.responses import json_response
from app.api.services import services_of
from app.observability.metrics import ModelCounts
from app.protocols.open_inference_routes import FINDING, TAG, find_model, get

router = APIRouter(tags=[TAG])


class Duration(BaseModel):
    """How often, and nanoseconds in all."""

    count: int
    ns: int


class InferenceStatistics(BaseModel):
    """Where the time of all requests went. `queue` counts waits, `compute_infer` batches, the others requests."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(BaseModel):
    """What a version of a model has done since the service began, whichever route and worker it was asked through."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970; 0 if there was none.")
    inference_count: int = Field(description="Items of all requests that were answered.")
    execution_count: int = Field(description="Batches that ran.")
    inference_stats: InferenceStatistics
    batch_stats: list[dict[str, Any]]


class StatisticsList(BaseModel):
    """Statistics of one or all models."""

    model_stats: list[ModelStatistics]


@get(router, "/v2/models/stats", StatisticsList, "Statistics of all models")
async def statistics(request: Request) -> Response:
    """What every served version has done since the service began, over all workers."""
    counts = services_of(request).metrics.model_counts()
    ready = [key for key, found in sorted(services_of(request).fleet.versions().items()) if found.state == "ready"]
    return json_response({"model_stats": [_statistics(*key, counts.get(key, ModelCounts())) for key in ready]})


@get(router, "/v2/models/{name}/stats", StatisticsList, "Statistics of a model", FINDING)
async def model_statistics(request: Request) -> Response:
    """What the model's versions have done since the service began, over all workers."""
    served = find_model(request)
    key = (served.manifest.name, served.manifest.version)
    counts = services_of(request).metrics.model_counts()
    keys = [key]
    if "version" not in request.path_params:
        states = sorted(services_of(request).fleet.versions().items())
        keys = [other for other, found in states if other[0] == key[0] and found.state == "ready"] or keys
    return json_response({"model_stats": [_statistics(*each, counts.get(each, ModelCounts())) for each in keys]})


def _statistics(name: str, version: int, counts: ModelCounts) -> dict[str, Any]:
    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": round(seconds * 1e9)}

    return {
        "name": name,
        "version": str(version),
        "last_inference": round(counts.last_answered_at * 1000),
        "inference_count": counts.items,
        "execution_count": counts.batches,
        "inference_stats": {
            "success": duration(counts.answered, counts.answered_s),
            "fail": duration(counts.failed, counts.failed_s),
            "queue": duration(counts.waits, counts.queue_s),
            "compute_input": duration(counts.answered, counts.decode_s),
            "compute_infer": duration(counts.batches, counts.run_s),
            "compute_output": duration(counts.answered, counts.encode_s),
            "cache_hit": duration(0, 0),
            "cache_miss": duration(0, 0),
        },
        "batch_stats": [],
    }
