"""POST /anomaly-score over a real socket: complete, consistent verdicts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

FIELDS = ["score", "p_value", "is_anomaly", "threshold", "target_fpr", "calibration_id", "extrapolated", "components"]


@pytest.fixture(scope="module")
def mixed() -> np.ndarray:
    """Twenty items like the calibration's and twenty unlike them."""
    generator = np.random.default_rng(11)
    normal = generator.random((20, 1, 8, 8)) * 0.9
    odd = np.round(generator.random((20, 1, 8, 8))) * 0.9
    return np.concatenate([normal, odd]).astype(np.float32)


def scored(client: httpx.Client, items: np.ndarray, query: str = "") -> list[dict]:
    answer = client.post(f"/anomaly-score?model=tiny{query}", json={"instances": items.tolist()})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


@pytest.mark.parametrize("target_fpr", [None, 0.01, 0.05, 0.29, 0.5, 0.999])
def test_verdicts_are_complete_and_consistent(
    client: httpx.Client, store: Path, mixed: np.ndarray, target_fpr: float | None
) -> None:
    """Every field is there; score, p-value, threshold, rate and verdict agree as read from the JSON."""
    normal = np.sort(np.load(store / "tiny" / "2" / "calibration.npy"))
    manifest = json.loads((store / "tiny" / "2" / "manifest.json").read_text())
    results = scored(client, mixed, "" if target_fpr is None else f"&target_fpr={target_fpr}")
    for result in results:
        assert list(result) == FIELDS
        assert result["target_fpr"] == (0.01 if target_fpr is None else target_fpr)
        assert result["calibration_id"] == manifest["calibration"]["id"]
        assert result["p_value"] == (1 + int((normal >= np.float32(result["score"])).sum())) / 100
        # Written as the scores are, as float32: else a score equal to the threshold could be read as above it.
        assert result["threshold"] == float(str(np.float32(result["threshold"])))
        assert result["is_anomaly"] is (result["p_value"] <= result["target_fpr"])
        assert result["is_anomaly"] is (result["score"] > result["threshold"])
        assert (result["extrapolated"], result["components"]) == (False, {})
    assert len({result["is_anomaly"] for result in results}) == (1 if target_fpr == 0.999 else 2)


def test_score_is_the_reconstruction_error_that_reconstruct_tells(client: httpx.Client, mixed: np.ndarray) -> None:
    """A model that scores by mean squared error tells the same number at both endpoints."""
    errors = client.post("/reconstruct?model=tiny", json={"instances": mixed.tolist()}).json()["results"]
    for score, error in zip(scored(client, mixed), errors, strict=True):
        assert score["score"] == pytest.approx(error["reconstruction_error"], abs=1e-6)


def test_finest_rate_is_a_verdict_and_below_it_is_none(client: httpx.Client, mixed: np.ndarray) -> None:
    """1/(n + 1) is the finest rate; a finer one is refused, naming the rate that the data supports."""
    assert scored(client, mixed[:1], "&target_fpr=0.01")[0]["target_fpr"] == 0.01
    refused = client.post("/anomaly-score?model=tiny&target_fpr=0.009", json={"instances": mixed[:1].tolist()})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_parameter")
    assert "99 calibration scores support rates down to 1/100" in refused.json()["error"]


def test_npy_answer_is_score_and_p_value(client: httpx.Client, mixed: np.ndarray) -> None:
    """Accept: application/x-npy answers (n, 2) float64, equal to the JSON."""
    answer = client.post(
        "/anomaly-score?model=tiny", json={"instances": mixed.tolist()}, headers={"accept": "application/x-npy"}
    )
    array = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert (array.shape, array.dtype) == ((40, 2), np.float64)
    expected = [[result["score"], result["p_value"]] for result in scored(client, mixed)]
    np.testing.assert_allclose(array, expected, rtol=1e-6)


def test_default_goes_to_the_model_that_is_the_default_for_scores(client: httpx.Client, mixed: np.ndarray) -> None:
    """Without a model the artifact that names anomaly_score in default_for answers."""
    answer = client.post("/anomaly-score", json={"instances": mixed[:1].tolist()})
    assert answer.headers["x-model"] == "tiny:2"
