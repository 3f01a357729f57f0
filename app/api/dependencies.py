"""What an endpoint needs from the request and the application: the model it names, its deadline, its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from app.artifacts.calibration import Calibration
from app.artifacts.manifest import Capability, Manifest
from app.catalog import Catalog, ServedModel
from app.codecs.bodies import Body, decompress, parse_content_type
from app.errors import InvalidParameter, PayloadTooLarge
from app.observability.metrics import Metrics
from app.settings import Settings

MAX_TIMEOUT_MS = 600_000


def catalog_of(request: Request) -> Catalog:
    """The application's catalog."""
    catalog: Catalog = request.app.state.catalog
    return catalog


def metrics_of(request: Request) -> Metrics:
    """The application's metrics."""
    metrics: Metrics = request.app.state.metrics
    return metrics


def settings_of(request: Request) -> Settings:
    """The application's settings."""
    settings: Settings = request.app.state.settings
    return settings


@dataclass
class Model:
    """The model that a request names, with the request's time limit; remembers where the time went."""

    served: ServedModel
    timeout_s: float
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

    async def run(self, capability: Capability, *arguments: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """The exported method's outputs, each (n, …), for arguments of n rows each; raises as `Batcher.submit` does."""
        rows = list(zip(*arguments, strict=True))
        answered = await self.served.run(capability, rows, self.timeout_s)
        self.queued_s += answered.queued_s
        self.ran_s += answered.ran_s
        return tuple(np.stack(column) for column in zip(*answered.results, strict=True))


def request_timeout_s(request: Request) -> float:
    """The request's time limit in seconds: `X-Request-Timeout-Ms`, or the setting. Raises InvalidParameter."""
    text = request.headers.get("x-request-timeout-ms")
    if text is None:
        return settings_of(request).request_timeout_ms / 1000
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_TIMEOUT_MS):
        raise InvalidParameter(f"X-Request-Timeout-Ms: expected an integer from 1 to {MAX_TIMEOUT_MS}, found {text!r}")
    return int(text) / 1000


async def read_body(request: Request) -> Body:
    """The whole body, decompressed, at most `max_body_bytes` before and after.

    Raises PayloadTooLarge as soon as the limit is passed, without reading on.
    """
    limit = settings_of(request).max_body_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise PayloadTooLarge(f"body: expected at most {limit} bytes, found {declared}")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise PayloadTooLarge(f"body: expected at most {limit} bytes, found more")
        chunks.append(chunk)
    data = b"".join(chunks)
    if encoding := request.headers.get("content-encoding"):
        data = decompress(data, encoding, limit)
    media_type, parameters = parse_content_type(request.headers.get("content-type", ""))
    return Body(data, media_type, parameters)


def preferred_media_type(accept: str, offered: Sequence[str]) -> str | None:
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
