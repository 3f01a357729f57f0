"""Drift: nothing while items are as normal as the calibration's, plain to see when they are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from app.artifacts.calibration import Calibration
from app.artifacts.drift import BINS, RECENT, PValueSketch, measure_drift


def sketch_of(p_values: np.ndarray) -> PValueSketch:
    sketch = PValueSketch()
    sketch.add(p_values)
    return sketch


def test_normal_items_show_no_drift() -> None:
    """Over many calibrations, p-values of the test are below 5 % about as often, or more seldom."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        calibration = Calibration.from_scores(generator.normal(size=500).astype(np.float32))
        p_values = calibration.p_values(generator.normal(size=300).astype(np.float32))
        drift = measure_drift([sketch_of(p_values).counts], 500)
        assert drift is not None
        found.append(drift.p_value)
    assert 0.005 < np.mean(np.array(found) < 0.05) < 0.08


def test_other_items_show_it() -> None:
    """Items whose scores are half a deviation higher drift, and the test is near the exact one."""
    generator = np.random.default_rng(1)
    normal = generator.normal(size=2000).astype(np.float32)
    calibration = Calibration.from_scores(normal)
    scores = generator.normal(0.5, size=900).astype(np.float32)
    drift = measure_drift([sketch_of(calibration.p_values(scores)).counts], 2000)
    assert drift is not None
    assert drift.p_value < 1e-6
    assert drift.statistic == pytest.approx(ks_2samp(normal, scores).statistic, abs=0.03)


def test_workers_are_judged_together() -> None:
    """Counts of several workers are those of one that saw everything."""
    p_values = np.random.default_rng(2).random(600)
    whole = measure_drift([sketch_of(p_values).counts], 99)
    parts = measure_drift([sketch_of(part).counts for part in np.split(p_values, 3)], 99)
    assert whole == parts
    assert whole is not None
    assert whole.items == 600


def test_a_sketch_forgets() -> None:
    """However many p-values come, it is about the last ones, and of a bounded size."""
    sketch = PValueSketch()
    sketch.add(np.full(10 * RECENT, 0.99))
    assert RECENT // 2 <= sum(sketch.counts) <= RECENT
    sketch.add(np.full(RECENT, 0.01))
    assert sketch.counts[0] >= RECENT // 2
    assert sketch.counts[-1] == 0
    assert len(sketch.counts) == BINS


def test_edges_belong_to_the_bin_below() -> None:
    """P-values at the ends and at edges are counted where "at most" puts them."""
    counts = sketch_of(np.array([1e-12, 0.05, 0.05000001, 0.95, 1.0])).counts
    assert (counts[0], counts[1], counts[18], counts[19]) == (2, 1, 1, 1)


def test_nothing_is_said_of_nothing() -> None:
    """Without p-values there is no drift to tell."""
    assert measure_drift([], 99) is None
    assert measure_drift([[0] * BINS], 99) is None
