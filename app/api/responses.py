"""Successful answers as bytes."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    """The value as JSON, numpy arrays included: float32 with the fewest digits that read back the same."""
    return Response(
        orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json", headers=headers
    )
