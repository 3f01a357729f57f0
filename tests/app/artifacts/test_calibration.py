"""Split-conformal verdicts against brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from app.artifacts.calibration import Calibration, RateTooFine, Tail


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


def test_discoveries_are_benjamini_hochbergs() -> None:
    """On random scores the items called anomalies are those of the procedure on exact fractions."""
    from fractions import Fraction

    generator = np.random.default_rng(5)
    for _ in range(100):
        calibration = Calibration.from_scores(generator.normal(size=99).astype(np.float32))
        scores = generator.normal(generator.choice([0, 3], size=30)).astype(np.float32)
        counts = [1 + int((calibration.scores >= score).sum()) for score in scores]
        exact = sorted(Fraction(count, 100) for count in counts)
        allowed = [p for rank, p in enumerate(exact, 1) if p <= Fraction(1, 10) * Fraction(rank, 30)]
        verdicts = calibration.discoveries(scores, 0.1)
        expected = [Fraction(count, 100) <= (allowed[-1] if allowed else 0) for count in counts]
        assert verdicts.is_anomaly.tolist() == expected
        assert (verdicts.p_value <= verdicts.target_fpr).tolist() == expected
        assert (scores > np.float32(verdicts.threshold)).tolist() == expected


def test_false_discoveries_stay_below_the_rate() -> None:
    """Among many requests the share of normal items among those called anomalies is at most the rate, on average."""
    generator = np.random.default_rng(3)
    shares = []
    for _ in range(500):
        calibration = Calibration.from_scores(generator.normal(size=999).astype(np.float32))
        odd = generator.random(40) < 0.25
        scores = generator.normal(4.0 * odd).astype(np.float32)
        flagged = calibration.discoveries(scores, 0.2).is_anomaly
        shares.append((flagged & ~odd).sum() / max(1, flagged.sum()))
    assert np.mean(shares) <= 0.2 + 3 * np.std(shares) / np.sqrt(len(shares))


def test_a_tail_model_reaches_beyond_the_scores() -> None:
    """Finer than 1/(n + 1) the tail decides and says so; its rates are right where its shape is, and in agreement."""
    generator = np.random.default_rng(1)
    normal = np.sort(generator.exponential(size=2000).astype(np.float32))
    tail = Tail.fit(normal)
    assert tail is not None
    calibration = Calibration.from_scores(normal, tail)
    many = generator.exponential(size=1_000_000).astype(np.float32)
    verdicts = calibration.verdicts(many, 1e-4)
    assert verdicts.extrapolated
    assert 0.3e-4 < verdicts.is_anomaly.mean() < 3e-4
    assert (verdicts.is_anomaly == (verdicts.p_value <= 1e-4)).all()
    assert (verdicts.is_anomaly == (many > np.float32(verdicts.threshold))).all()
    order = np.argsort(many)
    assert (np.diff(verdicts.p_value[order]) <= 0).all()
    assert not calibration.verdicts(many[:10], 0.01).extrapolated


@pytest.mark.parametrize("rate", [5e-324, 1e-300])
def test_the_smallest_rates_have_a_threshold(rate: float) -> None:
    """A rate next to zero is a rate: its threshold is a number, above all scores."""
    normal = np.random.default_rng(0).exponential(size=1000).astype(np.float32)
    calibration = Calibration.from_scores(normal, Tail.fit(np.sort(normal)))
    verdicts = calibration.verdicts(np.array([1.0, 3000.0], np.float32), rate)
    assert normal.max() < verdicts.threshold < 3000
    assert verdicts.is_anomaly.tolist() == [False, True]


@pytest.mark.parametrize("scores", [np.arange(99), np.zeros(5000)], ids=["few", "alike"])
def test_no_tail_is_made_up(scores: np.ndarray) -> None:
    """Too few scores, or scores that do not differ, have no tail to go by."""
    assert Tail.fit(scores.astype(np.float32)) is None
