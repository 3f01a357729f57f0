"""Whether items still look as normal as those of the calibration: a bounded sketch of recent p-values, and a test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 20
RECENT = 2000
"""How many p-values a sketch is about at most: the last ones, give or take half of them."""


class PValueSketch:
    """Recent p-values of one version of a model, counted in `BINS` equal bins from 0 to 1.

    Old ones are forgotten by halves, so that it is about the last RECENT / 2 to RECENT, however many there were.
    """

    def __init__(self) -> None:
        self._before = [0] * BINS
        self._now = [0] * BINS
        self._left = RECENT // 2

    def add(self, p_values: NDArray[np.float64]) -> None:
        """Counts p-values, each above 0 and at most 1."""
        for p_value in p_values.tolist():
            # Bins are open below and closed above, as "at most" is said of p-values.
            self._now[min(BINS - 1, max(0, math.ceil(p_value * BINS) - 1))] += 1
            self._left -= 1
            if not self._left:
                self._before, self._now, self._left = self._now, [0] * BINS, RECENT // 2

    @property
    def counts(self) -> tuple[int, ...]:
        """By bin."""
        return tuple(before + now for before, now in zip(self._before, self._now, strict=True))


@dataclass(frozen=True)
class Drift:
    """Recent p-values beside what they are for items like the calibration's: spread evenly.

    `statistic` is the largest distance of their distribution from that one, at the bins' edges, 0 to 1; `p_value` how
    often normal items come to such a distance or a larger.

    Source: two-sample Kolmogorov-Smirnov test with Stephens' 1970 correction; between edges the distance may be larger.
    """

    counts: tuple[int, ...]
    statistic: float
    p_value: float

    @property
    def items(self) -> int:
        """How many p-values it is about."""
        return sum(self.counts)


def measure_drift(sketches: Iterable[Sequence[int]], calibrated: int) -> Drift | None:
    """The drift that sketches of several workers show together; None where no p-value has been counted.

    Args:
        sketches: counts by bin.
        calibrated: number of the calibration's scores.
    """
    counts = np.sum([*sketches, [0] * BINS], axis=0)
    items = int(counts.sum())
    if not items:
        return None
    edges = np.arange(1, BINS + 1) / BINS
    # p-values are multiples of 1 / (n + 1): so many of them lie at or below an edge.
    expected = np.floor(edges * (calibrated + 1) + 1e-9) / (calibrated + 1)
    statistic = float(np.abs(counts.cumsum() / items - expected).max())
    size = math.sqrt(items * calibrated / (items + calibrated))
    reach = (size + 0.12 + 0.11 / size) * statistic
    terms = [2 * (-1) ** (k - 1) * math.exp(-2 * (k * reach) ** 2) for k in range(1, 101)]
    p_value = 1.0 if reach < 0.2 else min(1.0, max(0.0, sum(terms)))  # the series does not converge at nothing
    return Drift(tuple(int(count) for count in counts), statistic, p_value)
