"""The anomaly threshold's foundation: scores that the exported module gives to normal items it never saw."""

from __future__ import annotations

import io

import numpy as np
from torch import Tensor

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import CalibrationEntry, Capability
from training.data import to_float
from training.export import ExportedModule

CALIBRATION_FILE = "calibration.npy"


def calibrate(exported: ExportedModule, images: Tensor, source: str) -> tuple[Calibration, CalibrationEntry, bytes]:
    """Scores held-out normal pictures.

    Args:
        exported: the module as served, so that its scores and these are the same function's.
        images: (items, *item): seen neither by training nor by the choice of anything.
        source: the data set and the part of it, for the manifest.

    Returns:
        The calibration, its entry in the manifest, and the bytes of CALIBRATION_FILE.
    """
    scores = exported.run(Capability.ANOMALY_SCORE, to_float(images)).numpy()
    calibration = Calibration.from_scores(scores)
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(calibration.scores, dtype="<f4"), allow_pickle=False)
    entry = CalibrationEntry(
        id=calibration.id,
        file=CALIBRATION_FILE,
        count=len(calibration.scores),
        source=source,
        default_target_fpr=max(0.01, calibration.finest_target_fpr),  # few normals cannot support 1 %
    )
    return calibration, entry, buffer.getvalue()
