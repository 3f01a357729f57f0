"""Successful answers as bytes."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import Field
from starlette.responses import Response

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
"""Two numbers; a tuple's schema is one that FastAPI's document gets wrong."""


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    """The value as JSON, numpy arrays included: float32 with the fewest digits that read back the same."""
    return Response(
        orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json", headers=headers
    )
