"""Successful answers as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from pydantic import Field
from starlette.responses import Response
from starlette.types import Send

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
"""Two numbers; a tuple's schema is one that FastAPI's document gets wrong."""


class Answer(Response):
    """A whole answer in memory, its headers given as they are sent: what every inference endpoint gives.

    Args:
        body: the bytes.
        media_type: theirs.
        status_code: 200 or another one.
    """

    def __init__(self, body: bytes, media_type: bytes, status_code: int = 200) -> None:
        # Starlette's would encode and look at each header.
        self.body: bytes
        self.status_code = status_code
        self.body = body
        self.background = None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", media_type)]


async def send_whole(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
    """Sends a whole answer as ASGI has it, in two messages."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(encode_json(value), media_type="application/json", headers=headers)


def encode_json(value: Any) -> bytes:
    """The value as JSON, numpy arrays included: float32 with the fewest digits that read back the same."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
