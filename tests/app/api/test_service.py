"""Envelope, probes, models, metrics, documentation: HTTP that belongs to no endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.api.errors import STATUS
from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service

GOOD = {"instances": [[0.5] * 64]}
INFERENCE = ("/encode", "/decode", "/reconstruct", "/denoise", "/anomaly-score", "/sample")


@pytest.mark.parametrize("request_id", ["a", "abc-123_X.y:z/+=@", "x" * 128])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/livez"), ("POST", "/encode"), ("GET", "/nowhere"), ("PUT", "/encode")]
)
def test_request_id_is_echoed(service: Service, request_id: str, method: str, path: str) -> None:
    """A harmless X-Request-Id comes back on every kind of answer."""
    answer = service.client.request(method, path, headers={"x-request-id": request_id})
    assert answer.headers.get_list("x-request-id") == [request_id]


@pytest.mark.parametrize("request_id", [b"", b"x" * 129, b"a b", b"a\tb", b'"', b"<script>", b"\xff", b"a,b", b"{}"])
def test_hostile_request_id_is_replaced(service: Service, request_id: bytes) -> None:
    """An X-Request-Id that is too long or holds anything but harmless characters is replaced by a drawn one."""
    answer = service.client.get("/livez", headers=[(b"x-request-id", request_id)])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_ids_are_drawn_anew(service: Service) -> None:
    """Requests without an id get different ones."""
    assert len({service.client.get("/livez").headers["x-request-id"] for _ in range(20)}) == 20


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz"])
def test_probes_answer_get_and_head(service: Service, path: str) -> None:
    """A probe's HEAD has the status and headers of its GET and no body."""
    get, head = service.client.get(path), service.client.head(path)
    assert (get.status_code, head.status_code, head.content) == (200, 200, b"")
    assert head.headers["content-length"] == str(len(get.content))


def test_probes_of_a_ready_service(service: Service) -> None:
    """Alive, ready without reasons, loaded."""
    assert service.client.get("/livez").json() == {"live": True}
    assert service.client.get("/readyz").json() == {"ready": True, "reasons": []}
    assert service.client.get("/startupz").json() == {
        "done": True,
        "loaded": 3,
        "refused": 0,
        "unloaded": 0,
        "loading": [],
    }


def test_models_tell_what_is_served(service: Service, store: Path) -> None:
    """Each model has its versions with states, and its default version's manifest."""
    models = {model["name"]: model for model in service.client.get("/models").json()["models"]}
    assert list(models) == ["tiny", "tiny-plain"]
    tiny, plain = models["tiny"], models["tiny-plain"]
    assert tiny["versions"] == [{"version": v, "state": "ready", "reason": None} for v in (1, 2)]
    assert tiny["default_version"] == 2
    assert tiny["capabilities"] == sorted(Capability)
    assert tiny["default_for"] == ["anomaly_score"]
    assert (tiny["input"]["shape"], tiny["input"]["range"], tiny["latent_dim"]) == ([1, 8, 8], [0, 1], 4)
    assert plain["unsupported"] == {"denoise": "denoising lowers PSNR from 14.9 to 14.1 dB"}
    assert set(plain["capabilities"]) == set(Capability) - {"sample", "denoise", "anomaly_map"}
    manifest = json.loads((store / "tiny" / "2" / "manifest.json").read_text())
    assert tiny["training"] == manifest["training"]
    assert tiny["calibration"]["id"] == manifest["calibration"]["id"]
    assert service.client.get("/models/tiny").json() == tiny


def test_metrics_move_truthfully(service: Service) -> None:
    """Requests by route and status, rows, failed rows and batches move by what happened, and by nothing else."""
    labels = {"model": "tiny", "version": "2", "capability": "encode"}
    names = {
        "rows": ("hourglass_rows_total", labels),
        "failed": ("hourglass_failed_rows_total", labels),
        "batches": ("hourglass_batch_rows_count", labels),
        "ok": ("hourglass_http_requests_total", {"method": "POST", "route": "/encode", "status": "200"}),
        "bad": ("hourglass_http_requests_total", {"method": "POST", "route": "/encode", "status": "400"}),
        "broken": ("hourglass_http_requests_total", {"method": "POST", "route": "/encode", "status": "500"}),
        "model": ("hourglass_http_requests_total", {"method": "GET", "route": "/models/{name}", "status": "200"}),
        "lost": ("hourglass_http_requests_total", {"method": "GET", "route": "unmatched", "status": "404"}),
    }

    def read() -> dict[str, float]:
        return {key: service.metric(name, **found) for key, (name, found) in names.items()}

    before = read()
    service.client.post("/encode?model=tiny", json={"instances": [[0.5] * 64] * 3})
    service.client.post("/encode?model=tiny", json={"instances": [[2] * 64]})
    service.client.post("/encode?model=tiny", json={"instances": [[0.96875] + [0.5] * 63]})
    service.client.get("/models/tiny")
    service.client.get("/nowhere/1")
    service.client.get("/nowhere/2")
    after = read()
    moved = {key: after[key] - before[key] for key in names}
    assert moved == {"rows": 4, "failed": 1, "batches": 2, "ok": 1, "bad": 1, "broken": 1, "model": 1, "lost": 2}
    assert service.metric("hourglass_ready") == 1
    assert service.metric("hourglass_model_state", model="tiny", version="2", state="ready") == 1


def test_metrics_labels_stay_few(service: Service) -> None:
    """Paths, queries and ids from outside never become labels."""
    for number in range(5):
        service.client.get(f"/x{number}?y={number}", headers={"x-request-id": f"id-{number}"})
        service.client.get(f"/models/m{number}")
    text = service.client.get("/metrics").text
    assert not re.search(r"/x\d|/models/m\d|id-\d", text)


def test_refused_artifacts_are_told_and_the_others_serve(
    tmp_path: Path, run_app: Callable[..., Any], write_artifact_named: Callable[..., ArtifactRef]
) -> None:
    """A refused artifact has its state and reason in /models, a 503 when it is named, and harms no other."""
    write_artifact_named(tmp_path, "good")
    (write_artifact_named(tmp_path, "broken").path / "model.pt").write_bytes(b"no model")
    (write_artifact_named(tmp_path, "good").path / "manifest.json").unlink()
    with run_app(Settings(models_store=tmp_path, log_format="json", required_models=("good",))) as service:
        client = service.client
        assert client.get("/readyz").status_code == 200
        broken, good = client.get("/models").json()["models"]
        (version,) = broken["versions"]
        assert version["state"] == "refused"
        assert version["reason"].startswith("model.pt: expected ")
        assert broken["default_version"] is None
        assert broken["capabilities"] == []
        assert [entry["state"] for entry in good["versions"]] == ["ready", "refused"]
        assert good["default_version"] == 1
        for url, reason in (
            ("broken", "broken:1 was refused: model.pt: expected"),
            ("good:2", "manifest.json: cannot"),
        ):
            answer = client.post(f"/encode?model={url}", json=GOOD)
            assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
            assert reason in answer.json()["error"]
            assert int(answer.headers["retry-after"]) >= 1
        assert client.post("/encode", json=GOOD).headers["x-model"] == "good:1"
        assert service.metric("hourglass_model_state", model="broken", state="refused") == 1


def test_store_of_refused_artifacts_is_not_ready(
    tmp_path: Path, run_app: Callable[..., Any], write_artifact_named: Callable[..., ArtifactRef]
) -> None:
    """With nothing to serve the service lives, is not ready, and answers 503 no_models with the reason."""
    (write_artifact_named(tmp_path, "broken").path / "manifest.json").write_text("{")
    with run_app(Settings(models_store=tmp_path, log_format="json")) as service:
        ready = service.client.get("/readyz")
        assert (ready.status_code, ready.json()["code"], ready.json()["ready"]) == (503, "not_ready", False)
        assert "broken:1 was refused: manifest.json" in ready.json()["reasons"][0]
        assert service.client.get("/livez").status_code == 200
        answer = service.client.post("/encode", json=GOOD)
        assert (answer.status_code, answer.json()["code"]) == (503, "no_models")
        assert "broken:1 was refused: manifest.json" in answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1


def test_missing_store_is_not_ready(tmp_path: Path, run_app: Callable[..., Any]) -> None:
    """A store that is not there leaves a living service that says so."""
    with run_app(Settings(models_store=tmp_path / "none", log_format="json")) as service:
        assert service.client.get("/readyz").json()["reasons"] == [f"models store {tmp_path / 'none'}: no such folder"]
        assert service.client.get("/models").json() == {"models": []}
        assert service.client.post("/sample").json()["code"] == "no_models"
        assert service.client.post("/sample?model=x").json()["code"] == "model_not_found"


class _References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attributes if name in ("src", "href") and value]


def test_documentation_needs_no_other_machine(service: Service) -> None:
    """GET / leads to the documentation, whose scripts and styles come from this very service."""
    answer = service.client.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/docs")
    references = _References()
    references.feed(answer.text)
    assert len(references.found) >= 3
    for reference in references.found:
        assert reference.startswith("/")
        assert not reference.startswith("//")
        assert service.client.get(reference).status_code == 200
    assert not re.search(r"https?://", answer.text)
    assert "/openapi.json" in answer.text


def test_openapi_lists_every_route_with_its_errors(service: Service) -> None:
    """Every route is documented with summary and errors, every error code with its status, all in the one form."""
    document = service.client.get("/openapi.json").json()
    expected = {*INFERENCE, "/models", "/models/{name}", "/livez", "/readyz", "/startupz", "/metrics"}
    assert document["paths"].keys() >= expected
    codes: dict[str, set[str]] = {}
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert operation["description"]
            for status, response in operation["responses"].items():
                if status >= "400":
                    codes.setdefault(status, set()).update(re.findall(r"`(\w+)`", response["description"]))
                    (reference,) = {content["schema"]["$ref"] for content in response["content"].values()}
                    assert reference.rsplit("/", 1)[1] in ("Problem", "NotReadyProblem", "NotLiveProblem")
    routing = {"not_found", "method_not_allowed"}  # of what is no route
    for status, code in STATUS.values():
        assert code in codes.get(str(status), set()) | routing, code
    for route in INFERENCE:
        operation = document["paths"][route]["post"]
        assert {parameter["name"] for parameter in operation["parameters"]} >= {
            "model",
            "images",
            "X-Request-Timeout-Ms",
        }
        assert operation["responses"].keys() >= {
            "200",
            "400",
            "404",
            "406",
            "409",
            "413",
            "415",
            "422",
            "429",
            "500",
            "503",
            "504",
        }
        assert "application/json" in operation["requestBody"]["content"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references == document["components"]["schemas"].keys()
