"""Split-conformal verdicts against brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from app.artifacts.calibration import Calibration, RateTooFine


def scores_with_ties(seed: int, count: int) -> np.ndarray:
    return (np.random.default_rng(seed).integers(0, 40, count) / 8).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_p_value_is_the_written_formula(seed: int) -> None:
    """P = (1 + number of calibration scores ≥ score) / (n + 1), ties included, by counting one by one."""
    normal, scores = scores_with_ties(seed, 57), scores_with_ties(seed + 100, 80)
    verdicts = Calibration.from_scores(normal).verdicts(scores, 0.1)
    assert verdicts.p_value.tolist() == [(1 + sum(bool(c >= s) for c in normal)) / 58 for s in scores]


@pytest.mark.parametrize("seed", range(20))
def test_verdict_threshold_and_p_value_agree(seed: int) -> None:
    """is_anomaly ⇔ p_value ≤ target_fpr ⇔ score > threshold, for any scores, ties and rates."""
    generator = np.random.default_rng(seed)
    normal = scores_with_ties(seed, int(generator.integers(3, 200)))
    calibration = Calibration.from_scores(normal)
    scores = np.concatenate([scores_with_ties(seed + 1, 50), normal])
    n = len(normal)
    rates = [*generator.uniform(1 / (n + 1), 1, 10), *(k / (n + 1) for k in range(1, n + 1)), 0.999999]
    for rate in rates:
        verdicts = calibration.verdicts(scores, float(rate))
        assert (verdicts.is_anomaly == (verdicts.p_value <= rate)).all(), rate
        assert (verdicts.is_anomaly == (scores > np.float32(verdicts.threshold))).all(), rate


@pytest.mark.parametrize("percent", range(1, 100))
def test_decimal_rates_are_decided_on_the_counts(percent: int) -> None:
    """With 99 normal scores a rate of k/100 allows exactly the k largest ranks, though .29 · 100 is less than 29."""
    rate = percent / 100
    verdicts = Calibration.from_scores(np.arange(99, dtype=np.float32)).verdicts(
        np.arange(-1, 99, dtype=np.float32) + np.float32(0.5), rate
    )
    assert verdicts.is_anomaly.sum() == Fraction(percent, 100) * 100


def test_a_rate_finer_than_the_data_is_refused() -> None:
    """Below 1/(n + 1) there is no verdict; at it there is."""
    calibration = Calibration.from_scores(np.arange(6, dtype=np.float32))
    assert calibration.verdicts(np.float32([9]), 1 / 7).is_anomaly.tolist() == [True]
    with pytest.raises(RateTooFine, match=r"target_fpr: 0\.14 is finer than 1/7"):
        calibration.verdicts(np.float32([9]), 0.14)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_exchangeable_normal_scores_are_flagged_at_the_rate(rate: float) -> None:
    """Over many calibrations the share of normal items called anomalies is the target, within sampling error."""
    generator = np.random.default_rng(7)
    flagged = [
        Calibration.from_scores(generator.gamma(2, size=99).astype(np.float32))
        .verdicts(generator.gamma(2, size=200).astype(np.float32), rate)
        .is_anomaly.mean()
        for _ in range(1000)
    ]
    assert np.mean(flagged) == pytest.approx(rate, abs=4 * np.std(flagged) / np.sqrt(len(flagged)))


def test_the_id_names_the_scores_whatever_their_order() -> None:
    """The same scores have the same id in any order, other scores another."""
    ascending, shuffled = np.float32([1, 2, 3]), np.float32([3, 1, 2])
    assert Calibration.from_scores(ascending).id == Calibration.from_scores(shuffled).id
    assert Calibration.from_scores(ascending).id != Calibration.from_scores(np.float32([1, 2, 3, 3])).id


@pytest.mark.parametrize(
    ("scores", "message"), [([], "at least one"), ([1, np.nan], "finite"), ([1, -np.inf], "finite")]
)
def test_unusable_scores_are_refused(scores: list[float], message: str) -> None:
    """No scores, or one that is not finite, make no calibration."""
    with pytest.raises(ValueError, match=message):
        Calibration.from_scores(np.float32(scores))
