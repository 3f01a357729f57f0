"""From an anomaly score to a verdict: split-conformal p-values against held-out normal scores."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

TAIL_SHARE, FEWEST_IN_TAIL = 0.05, 10


@dataclass(slots=True)
class Verdicts:
    """What a calibration says of a batch of scores, each array (batch,).

    `threshold` belongs to `target_fpr`: an item is an anomaly exactly if its score lies above it. `extrapolated`: the
    rate is finer than the scores support, so p-values above all of them are the tail model's.
    """

    p_value: NDArray[np.float64]
    is_anomaly: NDArray[np.bool_]
    threshold: float
    target_fpr: float
    extrapolated: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """What a calibration decides by at one false-positive rate; made once, for many batches.

    Args:
        calibration: whose scores.
        target_fpr: the rate.
        allowed: most calibration scores, and one, that may lie at or above an anomaly's; 0: the tail model decides.
        threshold: an item is an anomaly exactly if its score lies above it.
    """

    calibration: Calibration
    target_fpr: float
    allowed: int
    threshold: float

    @property
    def extrapolated(self) -> bool:
        """Whether the rate is finer than the scores support."""
        return not self.allowed

    def judge(self, scores: NDArray[np.float32]) -> Verdicts:
        """Judges scores, (batch,)."""
        counts, size = self.calibration.counts(scores), len(self.calibration.scores) + 1
        p_value = counts / size
        if self.allowed:
            return Verdicts(p_value, counts <= self.allowed, self.threshold, self.target_fpr)
        return self._beyond(scores, p_value, 1 / size)

    def _beyond(self, scores: NDArray[np.float32], p_value: NDArray[np.float64], finest: float) -> Verdicts:
        highest, tail, rate = self.calibration.scores[-1], self.calibration.tail, self.target_fpr
        above = scores.astype(np.float32) > np.float32(self.threshold)
        modelled = p_value if tail is None else np.minimum(tail.p_value(scores), finest)
        p_value = np.where(scores.astype(np.float32) > highest, modelled, p_value)
        # On the scores: p-values of a threshold's neighbours may differ by less than they are rounded.
        p_value = np.where(above, np.minimum(p_value, rate), np.maximum(p_value, np.nextafter(rate, 1)))
        return Verdicts(p_value, above, self.threshold, rate, extrapolated=True)


class RateTooFine(ValueError):
    """A false-positive rate below 1 / (n + 1): n normal scores cannot tell it from zero."""


@dataclass(frozen=True)
class Tail:
    """How the share of normal scores falls above `start`: share · exp(−(s − start) / scale).

    A model, not a measurement: right where scores are evidence in powers of ten, as fused ones are.
    """

    start: float
    scale: float
    share: float

    @classmethod
    def fit(cls, scores: NDArray[np.float32]) -> Self | None:
        """By the mean excess over the top 5 % of ascending scores; None where those are too few or all alike."""
        beyond = math.ceil(TAIL_SHARE * len(scores))
        if beyond < FEWEST_IN_TAIL:
            return None
        start = float(scores[-beyond - 1])
        scale = float((scores[-beyond:].astype(np.float64) - start).mean())
        return cls(start, scale, beyond / (len(scores) + 1)) if scale > 0 else None

    def p_value(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """The share of normal items with such a score or a higher."""
        excess = (scores.astype(np.float64) - self.start) / self.scale
        return np.asarray(self.share * np.exp(-np.maximum(excess, 0.0)))

    def score_at(self, rate: float) -> float:
        """The score that this share of normal items exceeds."""
        return self.start + self.scale * (math.log(self.share) - math.log(rate))  # their ratio may be too large


@dataclass(frozen=True)
class Calibration:
    """Sorted scores of normal items that neither training nor model selection saw.

    p = (1 + #{calibration scores ≥ score}) / (n + 1) is at most α with probability at most α for a normal item, if it
    is exchangeable with the calibration items.

    Source: Vovk, Gammerman & Shafer 2005; Bates et al. 2023, arXiv:2104.08279.
    """

    scores: NDArray[np.float32]  # (n,), ascending
    tail: Tail | None = None

    @cached_property
    def _ascending(self) -> list[float]:
        return self.scores.tolist()  # type: ignore[no-any-return]  # of one dimension

    @classmethod
    def from_scores(cls, scores: NDArray[np.float32], tail: Tail | None = None) -> Self:
        """A calibration from unsorted scores, (n,). Raises ValueError if there is none or one is not finite."""
        flat = np.asarray(scores, dtype=np.float32).reshape(-1)
        if flat.size == 0:
            raise ValueError("calibration scores: expected at least one, found none")
        if not np.isfinite(flat).all():
            raise ValueError("calibration scores: expected finite numbers, found NaN or infinity")
        return cls(np.sort(flat), tail)

    @property
    def id(self) -> str:
        """Names these very scores: the head of their SHA-256."""
        return "cal-" + hashlib.sha256(np.ascontiguousarray(self.scores, dtype="<f4").tobytes()).hexdigest()[:16]

    @property
    def finest_target_fpr(self) -> float:
        """The smallest false-positive rate that the data supports."""
        return 1 / (len(self.scores) + 1)

    def rule(self, target_fpr: float) -> Rule:
        """What to decide by at a false-positive rate in (0, 1).

        Raises RateTooFine below `finest_target_fpr` where there is no tail model.
        """
        n = len(self.scores)
        allowed = self._allowed(target_fpr)
        if allowed:
            return Rule(self, float(target_fpr), allowed, float(self.scores[n - allowed]))
        if self.tail is None:
            raise RateTooFine(f"target_fpr: {target_fpr} is finer than 1/{n + 1}, what {n} normal scores support")
        # As wide as the scores, and above all that were measured: those have p-values that are none of a model.
        threshold = np.float32(max(self.tail.score_at(target_fpr), float(self.scores[-1])))
        return Rule(self, float(target_fpr), 0, float(threshold))

    def verdicts(self, scores: NDArray[np.float32], target_fpr: float) -> Verdicts:
        """Judges scores, (batch,), at a false-positive rate in (0, 1). Raises as `rule` does."""
        return self.rule(target_fpr).judge(scores)

    def discoveries(self, scores: NDArray[np.float32], fdr: float) -> Verdicts:
        """Judges scores, (batch,), together: of those called anomalies, at most this share are normal on average.

        `target_fpr` is the p-value up to which items are called so, `threshold` lies at or above every other score.

        Source: Benjamini & Hochberg 1995; for conformal p-values Bates et al. 2023, arXiv:2104.08279.
        """
        found_counts = self.counts(scores)
        counts = np.sort(found_counts)
        ranks = np.arange(1, len(scores) + 1)
        rates = fdr * ranks / len(scores)
        found = np.flatnonzero(counts <= np.array([self._allowed(rate) for rate in rates]))
        rate = float(rates[found[-1]] if len(found) else rates[0])
        allowed = self._allowed(rate) if len(found) else 0
        n = len(self.scores)
        threshold = self.scores[n - allowed] if allowed else max(self.scores[-1], scores.astype(np.float32).max())
        return Verdicts(
            p_value=found_counts / (n + 1),
            is_anomaly=found_counts <= allowed,
            threshold=float(threshold),
            target_fpr=rate,
        )

    def p_values(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """(1 + #{calibration scores ≥ score}) / (n + 1), (batch,)."""
        return np.asarray(self.counts(scores) / (len(self.scores) + 1))

    def counts(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """1 + #{calibration scores ≥ score}, (batch,)."""
        # Not searchsorted: for one score it takes longer, and lets go of the interpreter on the way.
        size, ascending = len(self.scores) + 1, self._ascending
        return np.array([size - bisect_left(ascending, s) for s in scores.astype(np.float32, copy=False).tolist()])

    def _allowed(self, rate: float) -> int:
        """The largest k with k / (n + 1) ≤ rate."""
        n = len(self.scores)
        # Compared as p-values are, since .29 · 100 is 28.999… in binary floating point, and 3 / 7 · 7 may be 2.999…
        allowed = int(rate * (n + 1))
        return allowed + 1 if (allowed + 1) / (n + 1) <= rate else allowed
