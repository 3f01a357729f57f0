"""POST /anomaly-score: how unusual each item is, and how often a normal one would look like that."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from app.api.dependencies import Model
from app.api.routing import InferenceRouter, ItemsQuery, Results
from app.artifacts.calibration import RateTooFine
from app.artifacts.manifest import Capability
from app.codecs.items import Items
from app.errors import InvalidParameter

router = InferenceRouter(tags=["inference"])


class AnomalyQuery(ItemsQuery):
    """Query parameters of /anomaly-score."""

    target_fpr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="False-positive rate among normal items to decide at; unset: the artifact's own, usually 0.01.",
    )


class Verdict(BaseModel):
    """How unusual one item is."""

    score: float = Field(description="Anomaly score; higher is more unusual.")
    p_value: float = Field(
        description="(1 + number of calibration scores ≥ score) / (n + 1): how often a normal item looks like that."
    )
    is_anomaly: bool = Field(description="p_value ≤ target_fpr.")
    threshold: float = Field(description="Score above which an item is an anomaly at this target_fpr.")
    target_fpr: float
    calibration_id: str = Field(description="Names the normal scores that the verdict is measured against.")
    extrapolated: bool = Field(description="Whether the p-value reaches beyond what the calibration scores support.")
    components: dict[str, float] = Field(description="Parts of the score, by name.")


@router.items(
    "/anomaly-score", capability=Capability.ANOMALY_SCORE, answers=Verdict, query=AnomalyQuery, shows_pictures=False
)
async def anomaly_score(items: Items, model: Model, query: AnomalyQuery) -> Results:
    """Score each item against held-out normal data and decide at the false-positive rate that you choose."""
    calibration, entry = model.calibration, model.manifest.calibration
    if calibration is None or entry is None:
        raise RuntimeError(f"{model}: anomaly_score without a calibration got past the manifest")
    target_fpr = entry.default_target_fpr if query.target_fpr is None else query.target_fpr
    if target_fpr < calibration.finest_target_fpr:
        raise _too_fine(target_fpr, len(calibration.scores))
    outputs = await model.run(Capability.ANOMALY_SCORE, items.values)
    scores = outputs[0]  # (n,)
    try:
        verdicts = calibration.verdicts(scores, target_fpr)
    except RateTooFine as error:
        raise _too_fine(target_fpr, len(calibration.scores)) from error
    specs = model.manifest.capabilities[Capability.ANOMALY_SCORE].outputs
    parts = {spec.name: output for spec, output in zip(specs[1:], outputs[1:], strict=True) if spec.shape == ()}
    count = len(items)
    main = np.empty((count, 2))  # float64
    main[:, 0], main[:, 1] = scores, verdicts.p_value
    return Results(
        {
            "score": scores,
            "p_value": verdicts.p_value,
            "is_anomaly": verdicts.is_anomaly,
            # As wide as the scores: written in decimal, both still compare as they did.
            "threshold": [np.float32(verdicts.threshold)] * count,
            "target_fpr": [target_fpr] * count,
            "calibration_id": [entry.id] * count,
            "extrapolated": [False] * count,
            "components": [{name: part[index] for name, part in parts.items()} for index in range(count)],
        },
        main=main,
    )


def _too_fine(target_fpr: float, count: int) -> InvalidParameter:
    return InvalidParameter(
        f"target_fpr: {count} calibration scores support rates down to 1/{count + 1} = {1 / (count + 1):.3g}, "
        f"found {target_fpr:g}"
    )
