"""Streams of items: every form of body, answers in order, one item's trouble, and clients that do not read."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import socket
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from app.codecs.npy import encode_npy
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service

GOOD = [0.5] * 64


def picture(value: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), value).save(stream, "PNG")
    return stream.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def lines(*values: Any) -> bytes:
    return b"".join(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values)


def bulk(
    service: Service, content: Any, route: str = "encode", media_type: str | None = None, **more: Any
) -> list[Any]:
    """The answer's lines."""
    headers = {**({} if media_type is None else {"content-type": media_type}), **more.pop("headers", {})}
    answer = service.client.post(f"/bulk/{route}", content=content, headers=headers, **more)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("route", ["encode", "reconstruct", "denoise", "anomaly-score"])
def test_answers_are_those_of_the_route_in_order(service: Service, items: np.ndarray, route: str) -> None:
    """Each line has the route's fields for its item, with its index; the summary counts them."""
    many = np.concatenate([items] * 5)
    found = bulk(service, lines(*(item.ravel().tolist() for item in many)), route)
    own = service.client.post(f"/{route}", json={"instances": items.tolist()}).json()["results"]
    assert [line.pop("index") for line in found[:-1]] == list(range(50))
    flagged = sum(row.get("is_anomaly", False) for row in own)
    assert found[-1] == {"summary": {"items": 50, "ok": 50, "failed": 0, "anomalies": 5 * flagged}}
    for index, line in enumerate(found[:-1]):
        expected = own[index % 10]
        assert line.keys() == expected.keys()
        for name, value in line.items():
            if isinstance(value, float | list):
                np.testing.assert_allclose(value, expected[name], atol=1e-5)


def test_decode_and_inpaint(service: Service) -> None:
    """Latent vectors are decoded a line each, and holes filled that stand beside their items."""
    found = bulk(service, lines([0.5, -1, 0, 2], [1, 2]), "decode")
    own = service.client.post("/decode", json={"latents": [[0.5, -1, 0, 2]]}).json()["results"][0]
    assert found[0] == {"index": 0, **own}
    assert found[1]["code"] == "shape_mismatch"
    mask = [[1] * 8] * 4 + [[0] * 8] * 4
    found = bulk(service, lines({"instance": GOOD, "mask": mask}, {"instance": GOOD}), "inpaint")
    own = service.client.post("/inpaint", json={"instances": [GOOD], "masks": [mask]}).json()["results"][0]
    assert found[0] == {"index": 0, **own}
    assert "found no mask" in found[1]["error"]


def test_every_form_of_body_has_the_same_answers(service: Service) -> None:
    """NDJSON, npy, multipart and zip, compressed or not, give one answer for one picture."""
    grey = np.full((8, 8), 9, np.uint8)
    form_head = b'--x\r\ncontent-disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    form = form_head + picture() + b"\r\n--x--\r\n"
    ndjson = lines((grey / np.float32(255)).ravel().tolist())
    b64 = lines({"instance": {"b64": base64.b64encode(picture()).decode()}})
    ways: list[tuple[bytes, str, dict[str, str]]] = [
        (ndjson, "application/x-ndjson", {}),
        (ndjson, "application/x-www-form-urlencoded", {}),
        (ndjson.strip(), "application/jsonl", {}),
        (b"\n\r\n" + ndjson, "", {}),
        (b64, "application/x-ndjson", {}),
        (encode_npy(grey[np.newaxis]), "application/x-npy", {}),
        (encode_npy(grey.reshape(1, 64)), "application/x-npy", {}),
        (form, "multipart/form-data; boundary=x", {}),
        (zipped({"a.png": picture(), "b/": b"", "__MACOSX/a.png": b"x", ".hidden": b""}), "application/zip", {}),
        (gzip.compress(ndjson), "application/x-ndjson", {"content-encoding": "gzip"}),
        (zlib.compress(form), "multipart/form-data; boundary=x", {"content-encoding": "deflate"}),
    ]
    answers = []
    for content, media_type, headers in ways:
        first, summary = bulk(service, content, "anomaly-score", media_type, headers=headers)
        assert summary["summary"]["items"] == 1
        if "multipart" in media_type or "zip" in media_type:
            assert first.pop("name") == "a.png"
        answers.append(first)
    assert all(answer == answers[0] for answer in answers)


def test_records_as_csv(records_store: Path, run_app: Callable[..., AbstractContextManager[Service]]) -> None:
    """Records come as CSV, their columns in any order, with ids; a row that is none fails alone, a head that is none
    refuses the stream.
    """
    rows = np.random.default_rng(5).normal(size=(40, 64)).astype(np.float32)
    names = [f"f{number}" for number in reversed(range(64))]
    table = [",".join(["id", *names])] + [
        ",".join([f"r{index}", *(str(value) for value in row[::-1])]) for index, row in enumerate(rows)
    ]
    table[3] = "r2,1,2"
    table[4] = table[4].rsplit(",", 1)[0] + ",many"
    with run_app(Settings(models_store=records_store, log_format="json")) as service:
        found = bulk(service, "\n".join(table).encode(), "anomaly-score", "text/csv")
        own = service.client.post("/anomaly-score", json={"instances": rows.astype(float).tolist()}).json()["results"]
        assert [line["code"] for line in found[:-1] if "code" in line] == ["shape_mismatch", "invalid_input"]
        assert found[-1]["summary"]["ok"] == 38
        for index in (0, 1, *range(4, 40)):
            assert found[index]["id"] == f"r{index}"
            np.testing.assert_allclose(found[index]["score"], own[index]["score"], atol=1e-5)
        for head in ("f0,f1", ",".join(["colour", *names])):
            answer = service.client.post("/bulk/encode", content=head + "\n1,2\n", headers={"content-type": "text/csv"})
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input"), answer.text


def test_any_split_of_the_bytes_is_the_same(service: Service) -> None:
    """However the network cuts a body, its answers are the same."""
    form = b"".join(
        b'--x\r\ncontent-disposition: form-data; name="f"; filename="%d.png"\r\n\r\n%s\r\n' % (n, picture(n))
        for n in range(5)
    )
    bodies = {
        "application/x-ndjson": lines(*([n / 8] * 64 for n in range(5))),
        "application/x-npy": encode_npy(np.arange(320, dtype=np.float64).reshape(5, 64) / 320),
        "multipart/form-data; boundary=x": form + b"--x--\r\n",
        "application/zip": zipped({f"{n}.png": picture(n) for n in range(5)}),
    }
    for media_type, body in bodies.items():
        whole = bulk(service, body, "encode", media_type)
        for size in (1, 7, 100):
            pieces = (body[start : start + size] for start in range(0, len(body), size))
            found = bulk(service, pieces, "encode", media_type)
            assert found[-1] == whole[-1]
            for one, other in zip(found[:-1], whole[:-1], strict=True):
                assert {**one, "latent": 0} == {**other, "latent": 0}
                np.testing.assert_allclose(one["latent"], other["latent"], atol=1e-5)


def test_one_items_trouble_is_told_in_its_place(service: Service) -> None:
    """What cannot be read, is out of range, or fails in the model has its error where its answer would be."""
    poison, nan = [0.9375] + [0.5] * 63, [0.96875] + [0.5] * 63
    found = bulk(
        service,
        lines(
            {"id": "first", "instance": GOOD}, b"{nonsense\n", [2.0] * 64, {"id": 7, "instance": poison}, nan,
            {"instance": {"b64": "!"}}, {"instance": GOOD, "colour": 1}, {"id": [], "instance": GOOD}, ["1"] * 64,
            [[0.5] * 8] * 7, b"[" * 2000 + b"\n", b"[" + b"1" * 400 + b"]\n", b"\xff\n", [],
            {"id": "last", "instance": GOOD},
        ),
    )  # fmt: skip
    codes = [line.get("code") for line in found[:-1]]
    assert codes == [
        None, "malformed_payload", "invalid_input", "inference_failed", "inference_failed", "malformed_payload",
        "invalid_input", "invalid_input", "invalid_input", "shape_mismatch", "invalid_input", "shape_mismatch",
        "malformed_payload", "shape_mismatch", None,
    ]  # fmt: skip
    assert [line["index"] for line in found[:-1]] == list(range(15))
    for line in found[:-1]:
        assert "code" not in line or line["error"].startswith(f"item {line['index']}: ")
    assert (found[0]["id"], found[3]["id"], found[14]["id"]) == ("first", 7, "last")
    assert found[0]["latent"] == found[14]["latent"]
    assert found[-1] == {"summary": {"items": 15, "ok": 2, "failed": 13, "anomalies": 0}}


def test_bad_files_among_good_ones(service: Service) -> None:
    """Files that are no pictures, too large or bombs fail alone, with their names, in zip and form."""
    huge = bytearray(picture())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    files = {
        "good.png": picture(), "text.txt": b"hello", "huge.png": bytes(huge), "cut.png": picture()[:40],
        "bomb.png": bytes(2_000_000), "empty.png": b"", "last.png": picture(),
    }  # fmt: skip
    codes = [None, "image_not_decodable", "payload_too_large", "image_not_decodable", "payload_too_large"]
    codes += ["image_not_decodable", None]
    found = bulk(service, zipped(files), "encode", "application/zip")
    assert [line["name"] for line in found[:-1]] == list(files)
    assert [line.get("code") for line in found[:-1]] == codes
    found = bulk(service, None, "encode", files=[("f", item) for item in files.items()])
    assert [line.get("code") for line in found[:-1]] == codes
    assert found[-1]["summary"] == {"items": 7, "ok": 2, "failed": 5, "anomalies": 0}


HEAD = b'--x\r\ncontent-disposition: form-data; name="f"; filename="a"\r\n\r\n'
ZIP = zipped({"a.png": picture()})
REFUSED: dict[str, tuple[bytes, str, dict[str, str], int, str]] = {
    "empty": (b"", "application/x-ndjson", {}, 422, "malformed_payload"),
    "text": (b"x", "text/plain", {}, 415, "unsupported_media_type"),
    "brotli": (b"x", "", {"content-encoding": "br"}, 415, "unsupported_media_type"),
    "accept": (b"x", "", {"accept": "image/png"}, 406, "not_acceptable"),
    "no gzip": (b"x", "", {"content-encoding": "gzip"}, 422, "malformed_payload"),
    "gzip truncated": (gzip.compress(b"[]")[:-3], "", {"content-encoding": "gzip"}, 422, "malformed_payload"),
    "no boundary": (b"x", "multipart/form-data", {}, 422, "malformed_payload"),
    "wrong boundary": (HEAD + b"\r\n--x--\r\n", "multipart/form-data; boundary=y", {}, 422, "malformed_payload"),
    "form truncated": (HEAD, "multipart/form-data; boundary=x", {}, 422, "malformed_payload"),
    "no npy": (b"x" * 100, "application/x-npy", {}, 422, "malformed_payload"),
    "npy header cut": (encode_npy(np.zeros((1, 64)))[:9], "application/x-npy", {}, 422, "malformed_payload"),
    "npy shape": (encode_npy(np.zeros((1, 5))), "application/x-npy", {}, 400, "shape_mismatch"),
    "npy type": (encode_npy(np.zeros((1, 64), np.int64)), "application/x-npy", {}, 400, "invalid_input"),
    "npy rows by column": (
        encode_npy(np.zeros((2, 64))).replace(b"False", b"True "), "application/x-npy", {}, 400, "invalid_input"
    ),
    "no zip": (b"x" * 100, "application/zip", {}, 422, "malformed_payload"),
    "zip truncated": (ZIP[:-10], "application/zip", {}, 422, "malformed_payload"),
    "zip with a long list": (
        ZIP[:-10] + (2**31).to_bytes(4, "little") + ZIP[-6:], "application/zip", {}, 413, "payload_too_large"
    ),
    "csv for pictures": (b"a,b\n1,2\n", "text/csv", {}, 400, "invalid_input"),
    "timeout": (b"[]", "", {"x-request-timeout-ms": "soon"}, 400, "invalid_parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_stream_is_refused(service: Service, case: str) -> None:
    """Before the first answer an error is the answer's status, in the one form."""
    content, media_type, headers, status, code = REFUSED[case]
    answer = service.client.post("/bulk/encode", content=content, headers={"content-type": media_type, **headers})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert service.client.get("/readyz").status_code == 200


def test_parameters_are_the_routes(service: Service) -> None:
    """A bulk route takes the query of its route, and refuses what that refuses before anything is read."""
    assert bulk(service, lines(GOOD), "anomaly-score?target_fpr=.5")[0]["target_fpr"] == 0.5
    assert bulk(service, lines(GOOD), "reconstruct?images=png&model=tiny:1")[0]["reconstruction"].startswith("iVBOR")
    for query, status in (("target_fpr=.001", 400), ("target_fpr=x", 400), ("colour=1", 400), ("model=nobody", 404)):
        answer = service.client.post(f"/bulk/anomaly-score?{query}", content=lines(GOOD))
        assert answer.status_code == status, answer.text
    assert service.client.post("/bulk/sample", content=b"{}").json()["code"] == "not_found"
    assert service.client.get("/bulk/encode").json()["code"] == "method_not_allowed"
    assert (
        service.client.post("/bulk/denoise?model=tiny-plain", content=b"[]").json()["code"]
        == "capability_not_supported"
    )


@pytest.mark.parametrize(
    ("body", "media_type", "code"),
    [
        (encode_npy(np.zeros((40, 64)))[:-1], "application/x-npy", "malformed_payload"),
        (encode_npy(np.zeros((40, 64))) + b"x", "application/x-npy", "malformed_payload"),
        ((HEAD + picture() + b"\r\n") * 40, "multipart/form-data; boundary=x", "malformed_payload"),
    ],
)
def test_damage_after_the_first_answers_cuts_the_stream(
    service: Service, body: bytes, media_type: str, code: str
) -> None:
    """What was whole is answered, then comes the error with the next index, and no summary."""
    found = bulk(service, body, "encode", media_type)
    assert found[-1]["code"] == code
    assert [line["index"] for line in found] == list(range(len(found)))
    assert len(found) in (40, 41)
    assert all("latent" in line for line in found[:-1])


def connect(service: Service, head: str) -> socket.socket:
    sock = socket.create_connection(service.address)
    sock.settimeout(20)
    sock.sendall(f"POST {head}\r\nhost: x\r\n".encode())
    return sock


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def received(sock: socket.socket, until: bytes) -> bytes:
    found = b""
    while until not in found:
        data = sock.recv(65536)
        assert data, found[-500:]
        found += data
    return found


def test_answers_come_while_the_body_is_sent(service: Service) -> None:
    """Who sends an item and waits gets its answer before the next is sent."""
    with connect(service, "/bulk/encode HTTP/1.1\r\ntransfer-encoding: chunked") as sock:
        sock.sendall(b"\r\n")
        for index in range(3):
            sock.sendall(chunk(lines(GOOD)))
            assert b'"index":%d' % index in received(sock, b"\n\r\n" if index else b'"latent"')
        sock.sendall(b"0\r\n\r\n")
        assert b'"items":3' in received(sock, b"0\r\n\r\n")


@pytest.fixture(scope="module")
def narrow(store: Path, run_app: Callable[..., AbstractContextManager[Service]]) -> Iterator[Service]:
    """A service whose bulk requests may spool little."""
    with run_app(Settings(models_store=store, log_format="json", max_spool_bytes=3_000_000)) as service:
        yield service


def test_unread_answers_are_spooled_until_they_are_too_many(narrow: Service) -> None:
    """Who sends on and on without reading finds what was answered, then one error of 413's code, and no summary."""
    line = lines(GOOD)
    with connect(narrow, "/bulk/reconstruct HTTP/1.1\r\ntransfer-encoding: chunked") as sock:
        sock.sendall(b"\r\n")
        for _ in range(400):  # 40 000 items of 0.7 kB answers
            sock.sendall(chunk(line * 100))
        sock.sendall(b"0\r\n\r\n")
        found = received(sock, b"0\r\n\r\n")
    last = found[: -len(b"\r\n0\r\n\r\n")].splitlines()[-1]
    assert json.loads(last)["code"] == "payload_too_large", last
    assert b'"summary"' not in found[-2000:]
    answer = narrow.client.post("/bulk/encode", content=bytes(3_000_001), headers={"content-type": "application/zip"})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


def test_slow_reading_slows_the_work(narrow: Service) -> None:
    """Once the body is there, no more is answered than is read, and a client that leaves stops the work."""
    files = {f"{number}.png": picture() for number in range(12_000)}  # 8 MB of answers

    def rows() -> float:
        return narrow.metric("hourglass_rows_total", model="tiny", capability="reconstruct")

    body = zipped(files, zipfile.ZIP_STORED)
    before = rows()
    head = f"/bulk/reconstruct?model=tiny HTTP/1.1\r\ncontent-type: application/zip\r\ncontent-length: {len(body)}"
    sock = connect(narrow, head)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(b"\r\n" + body)
    narrow.until(lambda: rows() > before)
    seen = -1.0
    while rows() != seen:  # until it stands still
        seen = rows()
        time.sleep(0.3)
    assert seen - before < len(files)
    sock.close()
    narrow.until(lambda: "idle" in repr(narrow.app.state.catalog.batcher))
    assert rows() - before < len(files)


def temporary_files() -> int:
    """How many nameless files this process, which is the service's, has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since they were listed
            target = os.readlink(f"/proc/self/fd/{name}")
            found += target.startswith(tempfile.gettempdir()) and target.endswith("(deleted)")
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_a_client_that_leaves_frees_everything(
    store: Path, run_app: Callable[..., AbstractContextManager[Service]]
) -> None:
    """A connection closed amid a stream closes its spool and takes its rows out of the queue, whatever the device does;
    nothing of it is run any more.
    """
    settings = Settings(models_store=store, log_format="json", ready_within_seconds=600)  # nobody else has rows waiting
    with run_app(settings) as service:
        batcher, before = service.app.state.catalog.batcher, temporary_files()

        def rows() -> float:
            return service.metric("hourglass_rows_total", model="tiny", capability="reconstruct")

        with connect(service, "/bulk/reconstruct?model=tiny HTTP/1.1\r\ntransfer-encoding: chunked") as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(b"\r\n" + chunk(lines(GOOD) * 12_000))  # 8 MB of answers, more than sockets hold
            service.until(lambda: rows() == 12_000)
            assert temporary_files() > before
            with service.held_device():
                sock.sendall(chunk(lines(GOOD) * 5000))  # more than is received while nothing moves
                service.until(lambda: batcher.waiting_rows > 0)
                sock.close()
                service.until(lambda: batcher.waiting_rows == 0)
                service.until(lambda: temporary_files() == before)
        service.until(lambda: "idle" in repr(batcher))
        assert rows() <= 12_000 + 16  # the batch that was on its way to the device


def test_a_body_that_stops_is_a_timeout(service: Service) -> None:
    """Who sends nothing for as long as a request may take is told so."""
    with connect(service, "/bulk/encode HTTP/1.1\r\nx-request-timeout-ms: 50\r\ntransfer-encoding: chunked") as sock:
        sock.sendall(b"\r\n")
        assert b"deadline_exceeded" in received(sock, b"}")
