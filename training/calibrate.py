"""The anomaly threshold's foundation: scores that the exported module gives to normal items it never saw."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor

from app.artifacts.calibration import Calibration, Tail
from app.artifacts.manifest import CalibrationEntry, Capability, FusionEntry, MapScale, TailEntry
from training.dataset import to_float
from training.export import ExportedModule

CALIBRATION_FILE = "calibration.npy"
MAPS_AT_ONCE = 500


def calibrate(
    exported: ExportedModule, images: Tensor, source: str, fusion: FusionEntry | None = None
) -> tuple[Calibration, CalibrationEntry, bytes]:
    """Scores held-out normal items.

    Args:
        exported: the module as served, so that its scores and these are the same function's.
        images: (items, *item): seen neither by training nor by the choice of anything.
        source: the data set and the part of it, for the manifest.
        fusion: weights of the score's parts in place of the module's own.

    Returns:
        The calibration, its entry in the manifest, and the bytes of CALIBRATION_FILE.
    """
    calibration = Calibration.from_scores(scores_of(exported, to_float(images), fusion))
    tail = Tail.fit(calibration.scores)
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(calibration.scores, dtype="<f4"), allow_pickle=False)
    target_fpr = max(0.01, calibration.finest_target_fpr)  # few normals cannot support 1 %
    entry = CalibrationEntry(
        id=calibration.id,
        file=CALIBRATION_FILE,
        count=len(calibration.scores),
        source=source,
        default_target_fpr=target_fpr,
        tail=None if tail is None else TailEntry(start=tail.start, scale=tail.scale, share=tail.share),
        map=map_scale(exported, images, target_fpr) if Capability.ANOMALY_MAP in exported.methods else None,
    )
    return Calibration.from_scores(calibration.scores, tail), entry, buffer.getvalue()


def scores_of(exported: ExportedModule, items: Tensor, fusion: FusionEntry | None) -> np.ndarray:
    """Scores of float items, (items,), as the service computes them."""
    outputs = exported.outputs(Capability.ANOMALY_SCORE, items)
    return (outputs[0].numpy() if fusion is None else fusion.fuse(outputs[1].numpy())).astype(np.float32)


def map_scale(exported: ExportedModule, images: Tensor, target_fpr: float) -> MapScale:
    """What is typical of the maps of normal items, and what only the share `target_fpr` of them exceeds anywhere."""
    values, highest = [], []
    for batch in torch.split(images, MAPS_AT_ONCE):
        maps = exported.run(Capability.ANOMALY_MAP, to_float(batch)).flatten(1)
        values.append(maps[:, :: max(1, maps.shape[1] // 1024)])  # enough for a median, and bounded
        highest.append(maps.amax(1))
    typical = float(torch.cat(values).median())
    ordered = torch.cat(highest).sort().values
    # As many above it as the rate allows of n + 1 exchangeable items.
    allowed = max(1, math.floor(target_fpr * (len(ordered) + 1)))
    threshold = float(ordered[len(ordered) - allowed])
    return MapScale(typical=typical, threshold=max(threshold, typical + 1e-6), target_fpr=target_fpr)
