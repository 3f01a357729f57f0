"""Every row of the error table over a real socket: status, code, message, form and headers."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app import errors
from app.api.errors import INTERNAL, STATUS, problem_body
from app.codecs.npy import encode_npy
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service

GOOD = {"instances": [[0.5] * 64]}
POISON, NOT_A_NUMBER = 0.9375, 0.96875


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, 9).save(stream, "PNG")
    return stream.getvalue()


def checked(answer: httpx.Response, status: int, code: str, message: str = "") -> dict[str, Any]:
    """The error answer, which must have the one form that all of them have."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert (answer.status_code, body.get("code")) == (status, code), body
    assert body.keys() >= {"error", "code", "request_id"}
    assert body["request_id"] == answer.headers["x-request-id"]
    assert re.search(message, body["error"]), body["error"]
    return body


def post(url: str, **options: Any) -> tuple[str, str, dict[str, Any]]:
    return ("POST", url, {"json": GOOD, **options} if not options.keys() & {"content", "files", "json"} else options)


def typed(media_type: str, **more: str) -> dict[str, str]:
    return {"content-type": media_type, **more}


ERRORS: dict[str, tuple[tuple[str, str, dict[str, Any]], int, str, str]] = {
    "no items": (post("/encode", json={"instances": []}), 400, "invalid_input", "instances: expected at least one"),
    "not an object": (post("/encode", json=[1]), 400, "invalid_input", "body: expected an object"),
    "deep": (post("/encode", content=b"[" * 190_000), 400, "invalid_input", "nested more deeply"),
    "NaN": (
        post("/encode", content=b'{"instances": [[' + b"0," * 63 + b"NaN]]}"),
        400,
        "invalid_input",
        "item 0: .*NaN",
    ),
    "1e400": (post("/encode", content=b'{"instances": [[' + b"0," * 63 + b"1e400]]}"), 400, "invalid_input", "item 0"),
    "5000 digits": (
        post("/encode", content=b'{"instances": [[' + b"0," * 63 + b"1" * 5000 + b"]]}"),
        400,
        "invalid_input",
        "item 0",
    ),
    "range": (post("/reconstruct", json={"instances": [[2] * 64]}), 400, "invalid_input", "item 0: .* 0 to 1, found 2"),
    "text field": (post("/encode", files={"note": (None, "hi")}), 400, "invalid_input", "the field 'note'"),
    "latents missing": (post("/decode", json={"latent": []}), 400, "invalid_input", "latents"),
    "latents and more": (post("/decode", json={"latents": [[0] * 4], "ids": [1]}), 400, "invalid_input", "latents"),
    "latents overflow": (
        post("/decode", content=encode_npy(np.full((1, 4), 1e300)), headers=typed("application/x-npy")),
        400,
        "invalid_input",
        "item 0: expected finite",
    ),
    "sample of a list": (post("/sample", json=[]), 400, "invalid_input", "body: expected an object"),
    "shape": (post("/denoise", json={"instances": [[0.5]]}), 400, "shape_mismatch", r"item 0: expected \(1, 8, 8\)"),
    "latent shape": (post("/decode", json={"latents": [[1, 2]]}), 400, "shape_mismatch", r"expected \(4,\)"),
    "npy shape": (
        post("/encode", content=encode_npy(np.zeros((2, 5))), headers=typed("application/x-npy")),
        400,
        "shape_mismatch",
        "npy: expected",
    ),
    "unknown parameter": (post("/encode?colour=red"), 400, "invalid_parameter", "colour: unknown parameter; .* model"),
    "parameter of another route": (post("/encode?target_fpr=.1"), 400, "invalid_parameter", "target_fpr: unknown"),
    "parameter twice": (post("/encode?model=tiny&model=tiny"), 400, "invalid_parameter", "more than once"),
    "images=jpg": (post("/reconstruct?images=jpg"), 400, "invalid_parameter", "images: .*'png'"),
    "invert=maybe": (post("/encode?invert=maybe"), 400, "invalid_parameter", "invert: .*'maybe'"),
    "version is a word": (post("/encode?model=tiny:latest"), 400, "invalid_parameter", "name:version with a number"),
    "version is empty": (post("/encode?model=tiny:"), 400, "invalid_parameter", "name:version"),
    **{
        f"target_fpr={value}": (post(f"/anomaly-score?target_fpr={value}"), 400, "invalid_parameter", "^target_fpr: ")
        for value in ("0", "1", "-0.1", "nan", "inf", "x", "", "1e-400", "0.0099999")
    },
    **{
        f"timeout {value}": (
            post("/encode", headers={"x-request-timeout-ms": value}),
            400,
            "invalid_parameter",
            "X-Request-Timeout-Ms: expected an integer from 1 to 600000",
        )
        for value in (
            "0",
            "600001",
            "-1",
            "soon",
            "1.5",
            "",
            "1e3",
            "0000000000000001",
            "000000123456789",
            "9" * 5000,
        )
    },
    **{
        f"sample {body}": (post("/sample", content=body), 400, "invalid_parameter", f"^{name}: ")
        for body, name in {
            '{"count": 0}': "count",
            '{"count": 257}': "count",
            '{"count": 1.5}': "count",
            '{"count": "3"}': "count",
            '{"count": true}': "count",
            '{"count": null}': "count",
            '{"seed": -1}': "seed",
            '{"seed": 9007199254740992}': "seed",
            '{"seed": 1e3}': "seed",
            '{"seed": 99999999999999999999999}': "seed",
            '{"temperature": -0.5}': "temperature",
            '{"temperature": NaN}': "temperature",
            '{"temperature": Infinity}': "temperature",
            '{"temperature": 1e400}': "temperature",
            '{"temperature": "hot"}': "temperature",
            '{"label": 3}': "label",
            '{"sed": 3}': "sed",
        }.items()
    },
    "unknown model": (post("/encode?model=other"), 404, "model_not_found", "one of tiny, tiny-plain; found 'other'"),
    "nameless model": (post("/encode?model="), 404, "model_not_found", "found ''"),
    "unknown version": (post("/encode?model=tiny:9"), 404, "model_not_found", "versions 1, 2; found 9"),
    "endless version": (post("/encode?model=tiny:" + "1" * 5000), 404, "model_not_found", "versions 1, 2; found 1"),
    "model out of a path": (post("/encode?model=../tiny"), 404, "model_not_found", "found '../tiny'"),
    "model at its address": (("GET", "/models/other", {}), 404, "model_not_found", "found 'other'"),
    "nowhere": (("GET", "/nowhere", {}), 404, "not_found", "nothing is at /nowhere"),
    "nowhere to post": (("POST", "/encode/all", {}), 404, "not_found", "nothing is at /encode/all"),
    "no such asset": (("GET", "/static-offline-docs/none.js", {}), 404, "not_found", "none.js"),
    "out of the assets": (("GET", "/static-offline-docs/..%2f..%2f..%2fetc/passwd", {}), 404, "not_found", ""),
    "braces": (("GET", "/{path}", {}), 404, "not_found", r"nothing is at /\{path\}"),
    "GET /encode": (("GET", "/encode", {}), 405, "method_not_allowed", "GET is not allowed at /encode"),
    "PUT /encode": (("PUT", "/encode", {}), 405, "method_not_allowed", "PUT"),
    "POST /readyz": (("POST", "/readyz", {}), 405, "method_not_allowed", "POST"),
    "DELETE /models": (("DELETE", "/models", {}), 405, "method_not_allowed", "DELETE"),
    "POST to an asset": (("POST", "/static-offline-docs/swagger-ui.css", {}), 405, "method_not_allowed", "POST"),
    "xml": (post("/encode", headers={"accept": "application/xml"}), 406, "not_acceptable", "found 'application/xml'"),
    "refused by q": (post("/encode", headers={"accept": "*/*;q=0"}), 406, "not_acceptable", "accept"),
    "expected application/json or application/x-npy": (
        post("/encode", headers={"accept": "image/png"}),
        406,
        "not_acceptable",
        "expected application/json or application/x-npy",
    ),
    "no picture of scores": (
        post("/anomaly-score?model=tiny-plain", headers={"accept": "image/*"}),
        406,
        "not_acceptable",
        "expected application/json or application/x-npy",
    ),
    "cannot denoise": (
        post("/denoise?model=tiny-plain"),
        409,
        "capability_not_supported",
        "tiny-plain:1 does not support denoise: denoising lowers PSNR from 14.9 to 14.1 dB; models that do: tiny$",
    ),
    "cannot sample": (
        post("/sample?model=tiny-plain", json={}),
        409,
        "capability_not_supported",
        "models that do: tiny$",
    ),
    "large body": (
        post("/encode", content=b" " * 200_001),
        413,
        "payload_too_large",
        "at most 200000 bytes, found 200001",
    ),
    "large stream": (
        post("/encode", content=(b" " * 50_000 for _ in range(5))),
        413,
        "payload_too_large",
        "at most 200000 bytes, found more",
    ),
    "bomb": (
        post("/encode", content=gzip.compress(bytes(10_000_000)), headers={"content-encoding": "gzip"}),
        413,
        "payload_too_large",
        "at most 200000 bytes decompressed",
    ),
    "many rows": (
        post("/encode", json={"instances": [[0.5] * 64] * 41}),
        413,
        "payload_too_large",
        "at most 40, found 41",
    ),
    "many latents": (
        post("/decode", json={"latents": [[0] * 4] * 41}),
        413,
        "payload_too_large",
        "at most 40, found 41",
    ),
    "many samples": (post("/sample", json={"count": 41}), 413, "payload_too_large", "at most 40, got 41"),
    "many files": (
        post("/encode", files=[("f", ("x", b""))] * 41),
        413,
        "payload_too_large",
        "at most 40, found more",
    ),
    "large picture": (
        post("/encode", content=png((101, 100)), headers=typed("image/png")),
        413,
        "payload_too_large",
        "item 0: picture: 101 × 100 pixels, expected at most 10000",
    ),
    "plain text": (
        post("/encode", content=b"{}", headers=typed("text/plain")),
        415,
        "unsupported_media_type",
        "'text/plain'",
    ),
    "a form": (
        post("/encode", content=b"a=b", headers=typed("application/x-www-form-urlencoded")),
        415,
        "unsupported_media_type",
        "urlencoded",
    ),
    "brotli": (
        post("/encode", content=b"x", headers={"content-encoding": "br"}),
        415,
        "unsupported_media_type",
        "'br'",
    ),
    "latents as a picture": (
        post("/decode", content=png(), headers=typed("image/png")),
        415,
        "unsupported_media_type",
        "content-type: expected application/json or application/x-npy, found 'image/png'",
    ),
    "samples of text": (
        post("/sample", content=b"4", headers=typed("text/plain")),
        415,
        "unsupported_media_type",
        "text/plain",
    ),
    "empty": (post("/encode", content=b""), 422, "malformed_payload", "found an empty body"),
    "empty curl -d": (
        post("/encode", content=b"", headers=typed("application/x-www-form-urlencoded")),
        422,
        "malformed_payload",
        "empty body",
    ),
    "empty picture": (post("/encode", content=b"", headers=typed("image/png")), 422, "image_not_decodable", "0 bytes"),
    "empty npy": (post("/encode", content=b"", headers=typed("application/x-npy")), 422, "malformed_payload", "npy"),
    "empty latents": (post("/decode", content=b""), 422, "malformed_payload", "empty body"),
    "no JSON": (post("/encode", content=b"{"), 422, "malformed_payload", "not JSON"),
    "no UTF-8": (post("/encode", content=b'{"instances": "\xff"}'), 422, "malformed_payload", "not JSON"),
    "half a pair in ids": (
        post("/encode", content=json.dumps({**GOOD, "ids": ["x"]}).replace('"x"', r'"\ud800"').encode()),
        422,
        "malformed_payload",
        "not JSON",
    ),
    "half a pair in a name": (post("/sample", content=rb'{"\ud800": 1}'), 422, "malformed_payload", "not JSON"),
    "no base64": (
        post("/encode", json={"instances": [{"b64": "?"}]}),
        422,
        "malformed_payload",
        "item 0: b64: not base64",
    ),
    "no form": (
        post("/encode", content=b"x", headers=typed("multipart/form-data; boundary=B")),
        422,
        "malformed_payload",
        "multipart: ",
    ),
    "no boundary": (
        post("/encode", content=b"x", headers=typed("multipart/form-data")),
        422,
        "malformed_payload",
        "boundary",
    ),
    "no gzip": (post("/encode", content=b"{}", headers={"content-encoding": "gzip"}), 422, "malformed_payload", "gzip"),
    "lying npy": (
        post(
            "/encode",
            content=b"\x93NUMPY\x01\x00\x3b\x00{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1"
            + b"0" * 30
            + b")}",
            headers=typed("application/x-npy"),
        ),
        422,
        "malformed_payload",
        "npy: ",
    ),
    "text named .png": (
        post("/encode", files={"file": ("a.png", b"hello", "image/png")}),
        422,
        "image_not_decodable",
        "item 0: picture: expected one of PNG, .* found 5 bytes",
    ),
    "truncated PNG": (
        post("/encode", content=png((50, 50))[:-30], headers=typed("image/png")),
        422,
        "image_not_decodable",
        "item 0: picture",
    ),
    "truncated PNG inside": (
        post("/encode", json={"instances": [[0.5] * 64, {"b64": base64.b64encode(png()[:40]).decode()}]}),
        422,
        "image_not_decodable",
        "item 1: picture",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_has_its_status_code_and_message(service: Service, name: str) -> None:
    """Each kind of wrong request gets the contract's status and code, and a message that names what is wrong."""
    (method, url, options), status, code, message = ERRORS[name]
    if hasattr(options.get("content"), "__next__"):
        options["content"] = (b" " * 50_000 for _ in range(5))  # a generator serves once
    answer = service.client.request(method, url, **options)
    body = checked(answer, status, code, message)
    assert body.keys() == {"error", "code", "request_id"}
    assert service.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/encode", "POST"), ("POST", "/livez", "GET"), ("PATCH", "/models/tiny", "GET"),
     ("PUT", "/static-offline-docs/swagger-ui.css", "GET")],
)  # fmt: skip
def test_405_names_what_is_allowed(service: Service, method: str, path: str, allowed: str) -> None:
    """A 405 says in Allow which method would do."""
    answer = service.client.request(method, path)
    checked(answer, 405, "method_not_allowed")
    assert allowed in [name.strip() for name in answer.headers["allow"].split(",")]


def test_full_queue_is_a_429_with_retry_after(service: Service) -> None:
    """While as many rows wait as may, a request is refused and told when to come back; the others are answered."""
    rows = {"instances": [[0.5] * 64] * 40}
    batcher = service.app.state.catalog.batcher
    with service.held_device():
        first = service.post_aside("/encode", json=GOOD)
        service.until(lambda: "running" in repr(batcher))
        second = service.post_aside("/encode", json=rows)
        service.until(lambda: batcher.waiting_rows == 40)
        assert service.metric("hourglass_queue_rows") == 40
        refused = service.client.post("/encode", json=GOOD)
        checked(refused, 429, "queue_full", "queue: 40 rows of 10240 bytes wait, there is no room for 1 more")
        assert int(refused.headers["retry-after"]) >= 1
    assert (first().status_code, second().status_code) == (200, 200)
    assert service.metric("hourglass_queue_rows") == 0


def test_passed_deadline_is_a_504(service: Service) -> None:
    """A request that is not answered within its time limit gets a 504 that names it, and costs no forward."""
    rows = service.metric("hourglass_rows_total", model="tiny", version="2", capability="encode")
    with service.held_device():
        first = service.post_aside("/encode", json=GOOD)
        service.until(lambda: "running" in repr(service.app.state.catalog.batcher))
        late = service.client.post("/encode", json=GOOD, headers={"x-request-timeout-ms": "30"})
        checked(late, 504, "deadline_exceeded", "no answer within 30 ms")
    assert first().status_code == 200
    assert service.metric("hourglass_rows_total", model="tiny", version="2", capability="encode") == rows + 1


@pytest.mark.parametrize(("pixel", "kind"), [(POISON, "Error"), (NOT_A_NUMBER, "NotFiniteError")])
def test_bad_row_fails_its_own_request_alone(service: Service, items: np.ndarray, pixel: float, kind: str) -> None:
    """A row that raises or gives NaN fails its request, naming the index, and no other request of the batch."""
    bad = items[:3].copy()
    bad[1, 0, 0, 0] = pixel
    alone = [service.client.post("/encode", json={"instances": [item.tolist()]}).json() for item in items]
    with service.held_device():
        hold = service.post_aside("/encode", json=GOOD)
        service.until(lambda: "running" in repr(service.app.state.catalog.batcher))
        good = [service.post_aside("/encode", json={"instances": [item.tolist()]}) for item in items]
        failing = service.post_aside("/encode", json={"instances": bad.tolist()})
        service.until(lambda: service.app.state.catalog.batcher.waiting_rows == 13)
    assert hold().status_code == 200
    body = checked(failing(), 500, "inference_failed", f"item 1: .*{kind}")
    assert "poisoned" not in body["error"]  # what a module says of itself is for the log
    for answer, expected in zip(good, alone, strict=True):
        assert answer().status_code == 200
        np.testing.assert_allclose(answer().json()["results"][0]["latent"], expected["results"][0]["latent"], atol=1e-5)


@pytest.mark.parametrize("pixel", [POISON, NOT_A_NUMBER])
def test_one_bad_row_among_64_requests_is_one_error(
    run_app: Callable[..., AbstractContextManager[Service]], store: Path, pixel: float
) -> None:
    """Of 64 requests that wait together, one poisoned: exactly one fails, and 63 get their own right answers."""
    rows = (np.random.default_rng(1).random((64, 64)) * 0.9).astype(np.float32)
    sent, bad = rows.copy(), 37
    sent[bad, 0] = pixel
    with run_app(Settings(models_store=store, log_format="json")) as service:
        alone = [service.client.post("/encode", json={"instances": [row.tolist()]}).json() for row in rows]
        with service.held_device():
            hold = service.post_aside("/encode", json=GOOD)
            service.until(lambda: "running" in repr(service.app.state.catalog.batcher))
            asked = [service.post_aside("/encode", json={"instances": [row.tolist()]}) for row in sent]
            service.until(lambda: service.app.state.catalog.batcher.waiting_rows == 64)
        assert hold().status_code == 200
        answers = [answer() for answer in asked]
    assert [index for index, answer in enumerate(answers) if answer.status_code != 200] == [bad]
    checked(answers[bad], 500, "inference_failed", "item 0: ")
    for index, (answer, expected) in enumerate(zip(answers, alone, strict=True)):
        if index != bad:
            latent, own = answer.json()["results"][0]["latent"], expected["results"][0]["latent"]
            np.testing.assert_allclose(latent, own, atol=1e-5)


@pytest.mark.parametrize(
    "broken", ["app.api.models.services_of", "app.api.routing.encode_results", "app.api.routing.parse_query"]
)
def test_unforeseen_exception_is_a_bare_500_and_one_traceback(
    service: Service, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw tells the caller nothing but `internal`, and the log one traceback with the request's id."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(broken, fail)
    caplog.set_level(logging.INFO)
    if "models" in broken:
        answer = service.client.get("/models", headers={"x-request-id": "find-me"})
    else:
        answer = service.client.post("/encode", json=GOOD, headers={"x-request-id": "find-me"})
    body = checked(answer, 500, "internal")
    assert body == {"error": "internal error", "code": "internal", "request_id": "find-me"}
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage() for record in tracebacks] == ["request find-me failed"]


def test_loading_is_a_503_not_ready(store: Path, run_app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While artifacts load, probes answer, and requests get a 503 with Retry-After; then they are served."""
    from app import catalog

    release = threading.Event()
    read_artifact = catalog.read_artifact
    monkeypatch.setattr(catalog, "read_artifact", lambda ref: (release.wait(30), read_artifact(ref))[1])
    with run_app(Settings(models_store=store, log_format="json"), wait=False) as service:
        try:
            client = service.client
            service.until(lambda: client.get("/startupz").json()["loading"] != [])
            assert client.get("/livez").json() == {"live": True}
            progress = client.get("/startupz").json()
            assert progress == {
                "done": False,
                "loaded": 0,
                "refused": 0,
                "unloaded": 0,
                "loading": ["tiny:1", "tiny:2", "tiny-plain:1"],
            }
            ready = client.get("/readyz")
            body = checked(ready, 503, "not_ready", "loading tiny:1")
            assert (body["ready"], ready.headers["retry-after"]) == (False, "1")
            assert client.head("/readyz").status_code == 503
            for url in ("/encode", "/encode?model=tiny", "/encode?model=tiny:1"):
                answer = client.post(url, json=GOOD)
                checked(answer, 503, "not_ready", "still loading")
                assert answer.headers["retry-after"] == "1"
            checked(client.post("/encode?model=other", json=GOOD), 404, "model_not_found")
            states = {
                version["state"] for model in client.get("/models").json()["models"] for version in model["versions"]
            }
            assert states == {"loading"}
        finally:
            release.set()
        service.until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/encode", json=GOOD).status_code == 200
        assert client.get("/startupz").json() == {"done": True, "loaded": 3, "refused": 0, "unloaded": 0, "loading": []}


def test_every_error_has_a_row() -> None:
    """Each error of the project has its own status and code; an error without a row would be a bare 500."""
    classes = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)
    } - {errors.ServiceError, errors.Unavailable}
    assert STATUS.keys() == classes
    own = {kind: told for kind, told in STATUS.items() if kind is not errors.DeviceLost}  # told as what it leads to
    assert STATUS[errors.DeviceLost] == STATUS[errors.NotReady]
    assert len(set(own.values()) | {INTERNAL}) == len(own) + 1


def test_a_message_repeats_the_request_in_bounds() -> None:
    """A message that would repeat megabytes of the request is cut."""
    body = problem_body("x" * 1_000_000, "invalid_input", "id")
    assert len(body) < 3000
    assert json.loads(body)["error"].startswith("xxx")
