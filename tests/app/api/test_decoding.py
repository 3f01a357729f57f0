"""Pictures that take long: one after another, no longer than the request's time, and not for callers that left."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from app.api import decoding
from app.codecs import items as codec
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service


def large() -> bytes:
    """More pixels than are decoded on the event loop."""
    stream = io.BytesIO()
    Image.new("L", (300, 300), 9).save(stream, "PNG")
    return stream.getvalue()


FILES = [("file", (f"{number}.png", large())) for number in range(20)]


@dataclass
class Decoding:
    """Every decoding waits until it is released."""

    begun: int = 0
    has_begun: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def finish(self) -> None:
        """Releases it, and returns when no thread decodes any more."""
        self.release.set()
        threads = decoding._DECODERS._max_workers
        barrier = threading.Barrier(threads + 1)
        for _ in range(threads):
            decoding._DECODERS.submit(barrier.wait, 30)
        barrier.wait(30)


@pytest.fixture(scope="module")
def service(store: Path, run_app: Callable[..., AbstractContextManager[Service]]) -> Iterator[Service]:
    """A service that takes large pictures."""
    with run_app(Settings(models_store=store, log_format="json")) as service:
        yield service


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoding]:
    """A picture takes as long to decode as the test wants."""
    slow, decode = Decoding(), codec.picture_to_input

    def waiting(*arguments: Any, **options: Any) -> Any:
        slow.begun += 1
        slow.has_begun.set()
        slow.release.wait(30)
        return decode(*arguments, **options)

    monkeypatch.setattr(codec, "picture_to_input", waiting)
    yield slow
    slow.release.set()


def test_many_pictures_take_no_longer_than_the_request_may(service: Service, slow: Decoding) -> None:
    """The caller is told when the time is over, though a picture is still being decoded; none after it is begun."""
    answer = service.client.post("/encode", files=FILES, headers={"x-request-timeout-ms": "50"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded"), answer.text
    assert answer.json()["error"] == "deadline: no answer within 50 ms"
    slow.finish()
    assert slow.begun == 1


def test_pictures_of_a_caller_that_left_are_not_decoded(service: Service, slow: Decoding) -> None:
    """When a caller leaves, the picture that is being decoded is its last."""
    body = json.dumps({"instances": [{"b64": base64.b64encode(large()).decode()}] * 20}).encode()
    with socket.create_connection(service.address) as sock:
        sock.sendall(b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        assert slow.has_begun.wait(30)
    service.until(lambda: service.metric("hourglass_http_requests_total", status="499") > 0)
    slow.finish()
    assert slow.begun == 1


def test_bulk_pictures_that_take_too_long_are_told_in_place(service: Service, slow: Decoding) -> None:
    """Pictures of a stream whose time is over are answered so, each in its place, and the stream goes on."""
    answer = service.client.post("/bulk/encode", files=FILES[:4], headers={"x-request-timeout-ms": "200"})
    found = [json.loads(line) for line in answer.text.splitlines()]
    slow.finish()
    assert [line.get("code") for line in found[:-1]] == ["deadline_exceeded"] * 4
    assert found[0]["error"].startswith("item 0: deadline: ")
    assert found[-1]["summary"]["failed"] == 4
    assert slow.begun <= 2  # at most two chunks, the first picture alone
