"""From an anomaly score to a verdict: split-conformal p-values against held-out normal scores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Verdicts:
    """What a calibration says of a batch of scores, each array (batch,).

    `threshold` belongs to `target_fpr`: an item is an anomaly exactly if its score lies above it.
    """

    p_value: NDArray[np.float64]
    is_anomaly: NDArray[np.bool_]
    threshold: float
    target_fpr: float


class RateTooFine(ValueError):
    """A false-positive rate below 1 / (n + 1): n normal scores cannot tell it from zero."""


@dataclass(frozen=True)
class Calibration:
    """Sorted scores of normal items that neither training nor model selection saw.

    p = (1 + #{calibration scores ≥ score}) / (n + 1) is at most α with probability at most α for a normal item, if it
    is exchangeable with the calibration items.

    Source: Vovk, Gammerman & Shafer 2005; Bates et al. 2023, arXiv:2104.08279.
    """

    scores: NDArray[np.float32]  # (n,), ascending

    @classmethod
    def from_scores(cls, scores: NDArray[np.float32]) -> Self:
        """A calibration from unsorted scores, (n,). Raises ValueError if there is none or one is not finite."""
        flat = np.asarray(scores, dtype=np.float32).reshape(-1)
        if flat.size == 0:
            raise ValueError("calibration scores: expected at least one, found none")
        if not np.isfinite(flat).all():
            raise ValueError("calibration scores: expected finite numbers, found NaN or infinity")
        return cls(np.sort(flat))

    @property
    def id(self) -> str:
        """Names these very scores: the head of their SHA-256."""
        return "cal-" + hashlib.sha256(np.ascontiguousarray(self.scores, dtype="<f4").tobytes()).hexdigest()[:16]

    @property
    def finest_target_fpr(self) -> float:
        """The smallest false-positive rate that the data supports."""
        return 1 / (len(self.scores) + 1)

    def verdicts(self, scores: NDArray[np.float32], target_fpr: float) -> Verdicts:
        """Judges scores, (batch,), at a false-positive rate in (0, 1).

        Raises RateTooFine below `finest_target_fpr`.
        """
        n = len(self.scores)
        # On the counts: the largest k with k / (n + 1) ≤ target_fpr. Compared as p-values are, since .29 · 100 is
        # 28.999… in binary floating point, and 3 / 7 · 7 may be 2.999…
        allowed = int(target_fpr * (n + 1))
        if (allowed + 1) / (n + 1) <= target_fpr:
            allowed += 1
        if allowed < 1:
            raise RateTooFine(f"target_fpr: {target_fpr} is finer than 1/{n + 1}, what {n} normal scores support")
        counts = (n + 1) - self.scores.searchsorted(np.asarray(scores, np.float32))
        return Verdicts(
            p_value=counts / (n + 1),
            is_anomaly=counts <= allowed,
            threshold=float(self.scores[n - allowed]),
            target_fpr=float(target_fpr),
        )
