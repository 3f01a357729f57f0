"""POST /anomaly-score: how unusual each item is and where, and how often a normal one would look like that."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.calibration import Calibration, RateTooFine, Rule, Verdicts
from app.artifacts.manifest import CalibrationEntry, Capability
from app.capabilities.heatmap import boxes_above, overlays
from app.codecs.images import encode_png
from app.codecs.items import Items
from app.errors import CapabilityNotSupported, InvalidParameter, NotAcceptable
from app.served_model import ServedModel

router = InferenceRouter(tags=["inference"])

MOST_CONTRIBUTIONS = 10
CEILING = 1.0  # of a heat-map: what only few normal items exceed anywhere


class AnomalyQuery(ItemsQuery):
    """Query parameters of /anomaly-score."""

    of_whole_request: ClassVar[tuple[str, ...]] = ("fdr",)

    target_fpr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="False-positive rate among normal items to decide at; unset: the artifact's own, usually 0.01.",
    )
    fdr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="In place of `target_fpr`: of the request's items called anomalies, at most this share is normal, "
        "on average (Benjamini-Hochberg).",
    )
    heatmap: Literal["none", "array", "png", "true", "false"] = Field(
        "none",
        description="Pictures: where each is unusual, on one scale for all: 0 is typical, above 1 is what few normal "
        "pictures show anywhere. `array` (or `true`): height × width numbers; `png`: laid over the picture, in base64.",
    )
    boxes: bool = Field(False, description="`true`: pictures: rectangles around what is above 1 in the heat-map.")


class Contribution(BaseModel):
    """What one feature of a record has to do with its score."""

    feature: str
    value: float = Field(
        description="On one scale for all records: 0 is typical, few normal records exceed 1 anywhere."
    )


class Verdict(BaseModel):
    """How unusual one item is."""

    score: float = Field(description="Anomaly score; higher is more unusual.")
    p_value: float = Field(
        description="(1 + number of calibration scores ≥ score) / (n + 1): how often a normal item looks like that."
    )
    is_anomaly: bool = Field(description="p_value ≤ target_fpr.")
    threshold: float = Field(description="Score above which an item is an anomaly at this target_fpr.")
    target_fpr: float = Field(description="With `fdr`, the p-value up to which this request's items are anomalies.")
    calibration_id: str = Field(description="Names the normal scores that the verdict is measured against.")
    extrapolated: bool = Field(
        description="Whether target_fpr is finer than the calibration scores support, so that a model of their tail "
        "decides."
    )
    components: dict[str, float] = Field(
        description="Parts of the score by name, each −log10 of the share of normal items that are so unusual in it."
    )
    contributions: list[Contribution] | None = Field(
        None, description="Records alone: the features that are most unusual, the first most of all."
    )
    heatmap: list[Any] | str | None = Field(
        None, description="With `heatmap` alone: height × width numbers, or a base64 PNG file."
    )
    boxes: list[list[int]] | None = Field(
        None, description="With `boxes=true` alone: [x0, y0, x1, y1] in model pixels, x1 and y1 just outside."
    )


@router.items("/anomaly-score", capability=Capability.ANOMALY_SCORE, answers=Verdict, query=AnomalyQuery)
async def anomaly_score(items: Items, model: Model, query: AnomalyQuery) -> Results:
    """Score each item against held-out normal data and decide at the false-positive rate that you choose."""
    served = model.served
    manifest = served.manifest
    decision = served.remembered(_Decision, query, model.shows_picture)
    if decision.with_map:
        outputs, places = await _with_places(items, model)
    else:
        outputs, places = await model.run(Capability.ANOMALY_SCORE, items.values), None
    scores = outputs[0] if manifest.fusion is None else manifest.fusion.fuse(outputs[1])  # (n,)
    verdicts = decision.judge(scores)
    served.p_values.add(verdicts.p_value)
    names = manifest.components
    columns: dict[str, Any] = {
        "score": scores,
        "p_value": verdicts.p_value,
        "is_anomaly": verdicts.is_anomaly,
        "components": [dict(zip(names, parts, strict=True)) for parts in outputs[1]] if names else [{}] * len(scores),
    }
    shared = decision.shared or _shared(verdicts, decision.entry)
    results = Results(columns, main=lambda: np.stack([scores.astype(np.float64), verdicts.p_value], 1), shared=shared)
    if places is None:
        return results
    if manifest.input.picture is None:
        columns["contributions"] = _contributions(places, manifest.input.names)
        return results
    return _with_maps(results, items, model, query, places[:, 0])


async def _with_places(items: Items, model: Model) -> tuple[tuple[NDArray[np.float32], ...], NDArray[np.float32]]:
    """What the artifact says of the items, and its map of them, both waiting at once."""
    try:
        async with asyncio.TaskGroup() as group:
            scoring = group.create_task(model.run(Capability.ANOMALY_SCORE, items.values))
            mapping = group.create_task(heatmaps(items, model))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return scoring.result(), mapping.result()


async def heatmaps(items: Items, model: Model) -> NDArray[np.float32]:
    """Where each item is unusual, (n, *mask_shape): 0 is typical, few normal items exceed 1 anywhere."""
    scale = _calibration(model.served)[1].map
    if scale is None:
        raise RuntimeError(f"{model}: anomaly_map without a scale got past the manifest")
    (values,) = await model.run(Capability.ANOMALY_MAP, items.values)
    unit = np.float32(scale.threshold - scale.typical)
    return np.asarray((values - np.float32(scale.typical)) / unit, dtype=np.float32)


class _Decision:
    """How a model's items are judged as a query asks for it: the same for all requests that ask so.

    Raises InvalidParameter for rates that nothing supports, and what `_wants_map` does.
    """

    def __init__(self, served: ServedModel, query: AnomalyQuery, shows_picture: bool) -> None:
        calibration, self.entry = _calibration(served)
        self.shared: dict[str, Any] | None = None  # what every item's answer has alike, if no item has a say in it
        if query.fdr is None:
            rule = _rule(calibration, self.entry, query.target_fpr)
            self.judge = rule.judge
            self.shared = _shared(rule, self.entry)
        elif query.target_fpr is not None:
            raise InvalidParameter("fdr: expected either fdr or target_fpr, found both")
        else:
            self.judge = partial(calibration.discoveries, fdr=query.fdr)
        self.with_map = _wants_map(served, query, shows_picture=shows_picture)


def _shared(decided: Rule | Verdicts, entry: CalibrationEntry) -> dict[str, Any]:
    return {
        # As wide as the scores: written in decimal, both still compare as they did.
        "threshold": np.float32(decided.threshold),
        "target_fpr": decided.target_fpr,
        "calibration_id": entry.id,
        "extrapolated": decided.extrapolated,
    }


def _calibration(served: ServedModel) -> tuple[Calibration, CalibrationEntry]:
    calibration, entry = served.calibration, served.manifest.calibration
    if calibration is None or entry is None:
        raise RuntimeError(f"{served}: anomaly_score without a calibration got past the manifest")
    return calibration, entry


def _rule(calibration: Calibration, entry: CalibrationEntry, target_fpr: float | None) -> Rule:
    rate = entry.default_target_fpr if target_fpr is None else target_fpr
    try:
        return calibration.rule(rate)
    except RateTooFine as error:
        count = len(calibration.scores)
        raise InvalidParameter(
            f"target_fpr: {count} calibration scores support rates down to 1/{count + 1} = {1 / (count + 1):.3g}, "
            f"found {rate:g}"
        ) from error


def _wants_map(served: ServedModel, query: AnomalyQuery, *, shows_picture: bool) -> bool:
    """Whether the map is to be computed. Raises InvalidParameter or CapabilityNotSupported where there is none."""
    able = Capability.ANOMALY_MAP in served.manifest.capabilities
    wanted = query.heatmap not in ("none", "false") or query.boxes
    if served.manifest.input.picture is None:
        if wanted:
            name = "boxes" if query.boxes else "heatmap"
            raise InvalidParameter(f"{name}: this model takes records, whose contributions every answer has")
        return able
    if wanted and not able:
        raise CapabilityNotSupported(f"{served} has no map of where a picture is unusual")
    if shows_picture and not able:
        raise NotAcceptable(f"accept: expected application/json or application/x-npy: {served} has no map to show")
    return wanted or shows_picture


def _with_maps(results: Results, items: Items, model: Model, query: AnomalyQuery, maps: NDArray[np.float32]) -> Results:
    """The results with heat-maps, (n, height, width), as they are asked for."""
    columns = results.columns
    value_range = model.manifest.input.range or (0.0, 1.0)
    if query.boxes:
        columns["boxes"] = [boxes_above(each, CEILING) for each in maps]
    if model.shows_picture:
        columns["heatmap"], results.pictures = overlays(items.values, maps, value_range), "heatmap"
    elif query.heatmap not in ("none", "false"):
        columns["heatmap"] = results.main = maps
        if query.heatmap == "png" or query.images == "png":
            laid = overlays(items.values, maps, value_range)
            columns["heatmap"] = [base64.b64encode(encode_png(each[np.newaxis], value_range)).decode() for each in laid]
    return results


def _contributions(places: NDArray[np.float32], names: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """Of each record, (n, features), its most unusual features."""
    orders = np.argsort(-places, axis=1, kind="stable")[:, :MOST_CONTRIBUTIONS]
    return [
        [{"feature": names[index], "value": values[index]} for index in order]
        for order, values in zip(orders, places, strict=True)
    ]
