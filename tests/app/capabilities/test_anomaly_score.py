"""POST /anomaly-score over a real socket: complete, consistent verdicts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.settings import Settings

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
        assert sorted(result) == sorted(FIELDS)
        assert result["target_fpr"] == (0.01 if target_fpr is None else target_fpr)
        assert result["calibration_id"] == manifest["calibration"]["id"]
        assert result["p_value"] == (1 + int((normal >= np.float32(result["score"])).sum())) / 100
        # Written as the scores are, as float32: else a score equal to the threshold could be read as above it.
        assert result["threshold"] == float(str(np.float32(result["threshold"])))
        assert result["is_anomaly"] is (result["p_value"] <= result["target_fpr"])
        assert result["is_anomaly"] is (result["score"] > result["threshold"])
        assert (result["extrapolated"], list(result["components"])) == (False, ["mean", "largest"])
        assert result["components"]["mean"] == result["score"] <= result["components"]["largest"]
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


def test_a_rate_may_be_of_false_discoveries(client: httpx.Client, mixed: np.ndarray) -> None:
    """With fdr the verdicts are Benjamini-Hochberg's over the request, and agree with p-values and scores as told."""
    results = scored(client, mixed, "&fdr=0.2")
    p_values = np.array([result["p_value"] for result in results])
    ordered = np.sort(p_values)
    below = np.flatnonzero(ordered <= 0.2 * np.arange(1, 41) / 40)
    expected = p_values <= (ordered[below[-1]] if len(below) else 0)
    assert [result["is_anomaly"] for result in results] == expected.tolist()
    assert 0 < expected.sum() < 40
    for result in results:
        assert result["is_anomaly"] is (result["p_value"] <= result["target_fpr"])
        assert result["is_anomaly"] is (result["score"] > result["threshold"])


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("fdr=0.1&target_fpr=0.1", "fdr: expected either"),
        ("fdr=1", "fdr: "),
        ("heatmap=red", "heatmap: "),
        ("boxes=perhaps", "boxes: "),
    ],
)
def test_bad_parameters_are_refused_by_name(client: httpx.Client, mixed: np.ndarray, query: str, named: str) -> None:
    """What contradicts itself or is no value of a parameter is a 400 that names it."""
    answer = client.post(f"/anomaly-score?model=tiny&{query}", json={"instances": mixed[:1].tolist()})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")
    assert answer.json()["error"].startswith(named)


def test_a_stream_knows_no_rate_of_discoveries(client: httpx.Client) -> None:
    """What judges all items together is refused for streams."""
    answer = client.post("/bulk/anomaly-score?model=tiny&fdr=0.1", content=b"[]")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")
    assert "a stream has no end" in answer.json()["error"]


def expected_maps(client: httpx.Client, items: np.ndarray) -> np.ndarray:
    """On the tiny model's scale: 0 at an error of .25, 1 at .5."""
    answer = client.post("/reconstruct?model=tiny", json={"instances": items.tolist()}).json()["results"]
    rebuilt = np.array([result["reconstruction"] for result in answer])
    return ((np.abs(items - rebuilt) - 0.25) / 0.25)[:, 0]


@pytest.mark.parametrize("asked", ["array", "true"])
def test_heatmaps_have_one_scale_for_all(client: httpx.Client, mixed: np.ndarray, asked: str) -> None:
    """A heat-map's values mean the same in every picture, whichever others are in the request."""
    together = scored(client, mixed[15:25], f"&heatmap={asked}")
    found = np.array([result["heatmap"] for result in together])
    np.testing.assert_allclose(found, expected_maps(client, mixed[15:25]), atol=1e-5)
    alone = scored(client, mixed[15:16], f"&heatmap={asked}")[0]["heatmap"]
    np.testing.assert_allclose(alone, found[0], atol=1e-5)
    assert sorted(together[0]) == sorted([*FIELDS, "heatmap"])


@pytest.mark.parametrize("asked", ["none", "false"])
def test_no_heatmap_is_computed_that_nobody_asks_for(service: Any, mixed: np.ndarray, asked: str) -> None:
    """Plain scoring runs one method."""
    labels = {"model": "tiny", "capability": "anomaly_map"}
    before = service.metric("hourglass_rows_total", **labels)
    assert sorted(scored(service.client, mixed[:1], f"&heatmap={asked}")[0]) == sorted(FIELDS)
    assert service.metric("hourglass_rows_total", **labels) == before
    scored(service.client, mixed[:1], "&heatmap=array")
    assert service.metric("hourglass_rows_total", **labels) == before + 1


def test_heatmaps_are_pictures_too(client: httpx.Client, mixed: np.ndarray) -> None:
    """As base64 PNG in JSON, as a PNG or a grid where that is accepted, as an array of maps in npy."""
    encoded = scored(client, mixed[20:21], "&heatmap=png")[0]["heatmap"]
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert (picture.mode, picture.size) == ("RGB", (8, 8))
    assert scored(client, mixed[20:21], "&heatmap=array&images=png")[0]["heatmap"] == encoded
    body = {"instances": mixed[20:21].tolist()}
    alone = client.post("/anomaly-score?model=tiny", json=body, headers={"accept": "image/png"})
    assert alone.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(alone.content))), np.asarray(picture))
    npy = client.post("/anomaly-score?model=tiny&heatmap=array", json=body, headers={"accept": "application/x-npy"})
    maps = np.load(io.BytesIO(npy.content), allow_pickle=False)
    assert (maps.shape, maps.dtype) == ((1, 8, 8), np.float32)
    np.testing.assert_allclose(maps, expected_maps(client, mixed[20:21]), atol=1e-5)


def test_boxes_are_around_what_is_unusual(client: httpx.Client, mixed: np.ndarray) -> None:
    """Every place above 1 is in a box, and each box touches one on all its sides."""
    result = scored(client, mixed[20:21], "&boxes=true&heatmap=array")[0]
    above = np.array(result["heatmap"]) > 1
    covered = np.zeros_like(above)
    for x0, y0, x1, y1 in result["boxes"]:
        covered[y0:y1, x0:x1] = True
        inside = above[y0:y1, x0:x1]
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert above.any()
    assert (covered | ~above).all()


def test_a_model_without_maps_says_so(client: httpx.Client, mixed: np.ndarray) -> None:
    """Asking for a heat-map where there is none is a 409, for a picture of it a 406; plain scores are answered."""
    body = {"instances": mixed[:1].tolist()}
    assert client.post("/anomaly-score?model=tiny-plain", json=body).status_code == 200
    for query in ("&heatmap=array", "&boxes=true"):
        answer = client.post(f"/anomaly-score?model=tiny-plain{query}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "capability_not_supported"), query
    answer = client.post("/anomaly-score?model=tiny-plain", json=body, headers={"accept": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")


@pytest.fixture(scope="module")
def records(records_store: Path, serve: Callable[[Settings], AbstractContextManager[str]]) -> Iterator[httpx.Client]:
    """A client of a service with a model of records."""
    with serve(Settings(models_store=records_store)) as url, httpx.Client(base_url=url) as client:
        yield client


def test_records_tell_which_features_contributed(records: httpx.Client) -> None:
    """The most unusual features come first, by name, on the scale of the calibration."""
    record = dict.fromkeys([f"f{index}" for index in range(64)], 0.5) | {"f7": 40.0, "f9": -3.0}
    result = records.post("/anomaly-score?model=rows", json={"instances": [record]}).json()["results"][0]
    contributions = result["contributions"]
    assert [entry["feature"] for entry in contributions[:2]] == ["f7", "f9"]
    values = [entry["value"] for entry in contributions]
    assert (len(values), values) == (10, sorted(values, reverse=True))
    rebuilt = records.post("/reconstruct?model=rows", json={"instances": [record]}).json()["results"][0][
        "reconstruction"
    ]
    assert values[0] == pytest.approx((abs(40 - rebuilt[7]) - 0.25) / 0.25, abs=1e-3)
    refused = records.post("/anomaly-score?model=rows&heatmap=array", json={"instances": [record]})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_parameter")
    assert "takes records" in refused.json()["error"]


def test_records_with_other_features_are_refused_by_name(records: httpx.Client) -> None:
    """Unknown and missing names, and values that are missing, are a 400 that names them."""
    record = dict.fromkeys([f"f{index}" for index in range(1, 64)], 0.5)
    answer = records.post("/anomaly-score?model=rows", json={"instances": [record | {"g": 1}]})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")
    assert "unknown features 'g'" in answer.json()["error"]
    assert "missing features 'f0'" in answer.json()["error"]
    answer = records.post("/anomaly-score?model=rows", json={"instances": [record | {"f0": None}]})
    assert answer.status_code == 400
    assert "'f0'" in answer.json()["error"]


def test_drift_is_told_of_the_verdicts_given(service: Any, mixed: np.ndarray) -> None:
    """Odd items show as drift in the model's entry and in the metrics, whichever route brought them."""
    before = service.client.get("/models/tiny").json()["drift"]
    seen = 0 if before is None else before["items"]
    for _ in range(5):
        scored(service.client, mixed[20:])
    lines = "\n".join(str(item.tolist()) for item in mixed[20:25])
    service.client.post("/bulk/anomaly-score?model=tiny", content=lines)
    drift = service.client.get("/models/tiny").json()["drift"]
    assert drift["items"] == sum(drift["counts"]) == seen + 105
    assert drift["p_value"] < 0.01
    for name, key in (("items", "items"), ("statistic", "statistic"), ("p_value", "p_value")):
        assert service.metric(f"hourglass_drift_{name}", model="tiny", version="2") == pytest.approx(drift[key])
