"""What an endpoint needs from the request and the application: the model it names, its deadline, its limits."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import Capability, Manifest
from app.artifacts.store import Projection
from app.codecs.bodies import Body, decompress, parse_content_type
from app.errors import DeadlineExceeded, InvalidParameter, PayloadTooLarge
from app.served_model import ServedModel
from app.settings import Settings

_HEADERS = "hourglass.headers"
WHOLE_BODY = "hourglass.body"
"""Where in a scope a server leaves the body, if all of it was there when the request began."""

MAX_TIMEOUT_MS = 600_000
MAX_PRIORITY = 9


@dataclass(slots=True)
class Terms:
    """On what terms a request is served: for how long, until when in seconds of the event loop's clock, for whom, and
    how urgently.
    """

    loop: asyncio.AbstractEventLoop
    timeout_ms: int
    deadline: float
    caller: str
    priority: int

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; at least a little, so that what is late is told so in the one way."""
        # Not the running loop: asking for that asks the kernel for the process's id each time.
        return max(1e-6, self.deadline - self.loop.time())


@dataclass(slots=True)
class Model:
    """The model that a request names, on the request's terms; remembers where the time went."""

    served: ServedModel
    terms: Terms
    shows_picture: bool = False
    """Whether the answer will be a picture, and nothing else."""
    queued_s: float = field(default=0.0, init=False)
    ran_s: float = field(default=0.0, init=False)

    def __str__(self) -> str:
        return str(self.served)

    @property
    def manifest(self) -> Manifest:
        """What the artifact says about itself."""
        return self.served.manifest

    @property
    def calibration(self) -> Calibration | None:
        """The scores that verdicts are measured against."""
        return self.served.calibration

    @property
    def projection(self) -> Projection | None:
        """The map of the latent space."""
        return self.served.projection

    def server_timing(self, decode_s: float, encode_s: float) -> bytes:
        """The header Server-Timing, in milliseconds."""
        seconds = (decode_s, self.queued_s, self.ran_s, encode_s)
        return b"decode;dur=%.3f, queue;dur=%.3f, run;dur=%.3f, encode;dur=%.3f" % tuple([s * 1e3 for s in seconds])

    async def run(self, capability: Capability, *arguments: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """The exported method's outputs, each (n, …), for arguments of n rows each; raises as `Batcher.submit` does."""
        terms = self.terms
        rows = list(zip(*arguments, strict=True))
        try:
            answered = await self.served.run(
                capability, rows, timeout_s=terms.left_s, caller=terms.caller, priority=terms.priority
            )
        except (
            DeadlineExceeded
        ) as error:  # what was left of the time, when it came to this, means nothing to the caller
            raise DeadlineExceeded(f"deadline: no answer within {terms.timeout_ms} ms") from error
        self.queued_s += answered.queued_s
        self.ran_s += answered.ran_s
        if len(rows) == 1:
            return tuple([np.asarray(output)[np.newaxis] for output in answered.results[0]])  # views; no copies
        return tuple([np.stack(column) for column in zip(*answered.results, strict=True)])


def headers_of(scope: Any) -> dict[bytes, bytes]:
    """The request's headers by lower-case name, the last of equals; one pass for all who look something up."""
    headers: dict[bytes, bytes] | None = scope.get(_HEADERS)
    if headers is None:
        headers = scope[_HEADERS] = dict(scope["headers"])
    return headers


def read_terms(scope: Any, headers: dict[bytes, bytes], settings: Settings, loop: asyncio.AbstractEventLoop) -> Terms:
    """The request's terms: `X-Request-Timeout-Ms` or the setting, `X-Request-Priority`, and whose connection it is.

    Raises InvalidParameter.
    """
    now = loop.time()
    timeout_ms = settings.request_timeout_ms
    if b"x-request-timeout-ms" in headers:
        timeout_ms = _integer(headers, "X-Request-Timeout-Ms", 1, MAX_TIMEOUT_MS)
    priority = 0
    if b"x-request-priority" in headers:
        priority = _integer(headers, "X-Request-Priority", 0, MAX_PRIORITY)
    client = scope.get("client")
    return Terms(loop, timeout_ms, now + timeout_ms / 1000, client[0] if client else "", priority)


def _integer(headers: dict[bytes, bytes], name: str, low: int, high: int) -> int:
    text = headers[name.lower().encode()].decode("latin-1")
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(high)) and low <= int(text) <= high):
        raise InvalidParameter(f"{name}: expected an integer from {low} to {high}, found {text!r}")
    return int(text)


async def read_body(request: Request, headers: dict[bytes, bytes], limit: int) -> Body:
    """The whole body, decompressed, at most `limit` bytes before and after; to be called within an `InFlight`.

    Raises PayloadTooLarge as soon as the limit is passed, without reading on, and ClientDisconnect.
    """
    data: bytes | None = request.scope.get(WHOLE_BODY)
    if data is None:
        data = await _receive_all(request.receive, headers, limit)
    elif len(data) > limit:
        raise PayloadTooLarge(f"body: expected at most {limit} bytes, found {len(data)}")
    if b"content-encoding" in headers:
        data = decompress(data, headers[b"content-encoding"].decode("latin-1"), limit)
    return Body(data, *_content_type(headers.get(b"content-type", b"")))


async def _receive_all(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """A body that comes in pieces."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise PayloadTooLarge(f"body: expected at most {limit} bytes, found {int(declared[:20])}")
    message = await _receive(receive)
    data: bytes = message.get("body", b"")
    if message.get("more_body"):
        chunks, size = [data], len(data)
        while message.get("more_body") and size <= limit:
            message = await _receive(receive)
            chunk = message.get("body", b"")
            chunks.append(chunk)
            size += len(chunk)
        data = b"".join(chunks)
    if len(data) > limit:
        raise PayloadTooLarge(f"body: expected at most {limit} bytes, found more")
    return data


async def _receive(receive: Receive) -> MutableMapping[str, Any]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


def _content_type(header: bytes) -> tuple[str, dict[str, str]]:
    # A multipart boundary is new every time: caching those would only push the others out.
    text = header.decode("latin-1")
    return parse_content_type(text) if ";" in text else _plain_content_type(text)


_plain_content_type = lru_cache(maxsize=128)(parse_content_type)


@lru_cache(maxsize=128)
def preferred_media_type(accept: str, offered: tuple[str, ...]) -> str | None:
    """The offered media type that the `Accept` header likes best; of equals the first offered; None if it likes none.

    A wildcard that covers several stands for the first offered, as does an empty header.
    """
    if not accept.strip():
        return offered[0]
    best: tuple[float, int] | None = None
    for rank, media_type in enumerate(offered):
        quality = _quality(accept, media_type)
        if quality > 0 and (best is None or quality > best[0]):
            best = (quality, rank)
    return None if best is None else offered[best[1]]


def _quality(accept: str, media_type: str) -> float:
    """How much an Accept header likes a media type, 0 to 1: the most specific range that covers it decides."""
    found: tuple[int, float] = (-1, 0.0)
    for item in accept.split(","):
        range_, *parameters = (part.strip().lower() for part in item.split(";"))
        if range_ == media_type:
            precision = 2
        elif range_.endswith("/*") and media_type.startswith(range_[:-1]):
            precision = 1
        elif range_ == "*/*":
            precision = 0
        else:
            continue
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        if precision > found[0]:
            found = (precision, quality)
    return found[1]
