"""The one table: error → status code and code. The only file that knows status codes of errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import orjson
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

from app import errors
from app.api.responses import Answer

STATUS: dict[type[errors.ServiceError], tuple[int, str]] = {
    errors.InvalidInput: (400, "invalid_input"),
    errors.ShapeMismatch: (400, "shape_mismatch"),
    errors.InvalidParameter: (400, "invalid_parameter"),
    errors.Unauthorized: (401, "unauthorized"),
    errors.Forbidden: (403, "forbidden"),
    errors.AdminDisabled: (403, "admin_disabled"),
    errors.ModelNotFound: (404, "model_not_found"),
    errors.NotFound: (404, "not_found"),
    errors.MethodNotAllowed: (405, "method_not_allowed"),
    errors.NotAcceptable: (406, "not_acceptable"),
    errors.CapabilityNotSupported: (409, "capability_not_supported"),
    errors.PayloadTooLarge: (413, "payload_too_large"),
    errors.UnsupportedMediaType: (415, "unsupported_media_type"),
    errors.MalformedPayload: (422, "malformed_payload"),
    errors.ImageNotDecodable: (422, "image_not_decodable"),
    errors.QueueFull: (429, "queue_full"),
    errors.InferenceFailed: (500, "inference_failed"),
    errors.NotReady: (503, "not_ready"),
    errors.DeviceLost: (503, "not_ready"),
    errors.ModelUnavailable: (503, "model_unavailable"),
    errors.NoModels: (503, "no_models"),
    errors.Draining: (503, "draining"),
    errors.DeadlineExceeded: (504, "deadline_exceeded"),
}
INTERNAL = (500, "internal")
_MAX_MESSAGE = 2000

_HTTP_ERRORS: dict[int, tuple[type[errors.ServiceError], str]] = {
    404: (errors.NotFound, "path: nothing is at {path}"),
    405: (errors.MethodNotAllowed, "method: {method} is not allowed at {path}"),
}


class Problem(BaseModel):
    """Every answer that is no success."""

    error: str = Field(description="What went wrong, naming the thing, the found and the expected.")
    code: str = Field(description="A stable name for it.")
    request_id: str = Field(description="Also in the header X-Request-Id.")


def problem_body(message: str, code: str, request_id: str, **more: object) -> bytes:
    """The JSON of an error answer; a message that repeats too much of the request is cut."""
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + " …"
    return orjson.dumps({"error": message, "code": code, "request_id": request_id, **more})


def code_of(error: Exception) -> str:
    """The stable name of an error."""
    return STATUS.get(type(error), INTERNAL)[1] if isinstance(error, errors.ServiceError) else INTERNAL[1]


def problem_response(request: Request, error: Exception) -> Answer:
    """The answer for an error, from the table; anything that is not in it is a bare 500."""
    request_id = request.scope.get("request_id", "")
    headers: list[tuple[bytes, bytes]] = []
    if isinstance(error, HTTPException):
        # Starlette's routing raises these; the table speaks of our own.
        headers += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
        kind, message = _HTTP_ERRORS.get(error.status_code, (errors.InvalidInput, str(error.detail)))
        error = kind(message.format(path=request.scope["path"], method=request.method))
    status, code = STATUS.get(type(error), INTERNAL) if isinstance(error, errors.ServiceError) else INTERNAL
    message = "internal error" if (status, code) == INTERNAL else str(error)
    if isinstance(error, errors.Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 422 and request.scope["path"].startswith("/v2/"):
        status = 400  # what clients of the Open Inference Protocol know
    if isinstance(error, errors.Unavailable):
        headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after_s)))
    answer = Answer(problem_body(message, code, request_id), b"application/json", status)
    answer.raw_headers += headers
    return answer


def problem_responses(raises: Iterable[type[errors.ServiceError]]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that raises these errors."""
    codes: dict[int, list[str]] = {}
    for kind in raises:
        status, code = STATUS[kind]
        codes.setdefault(status, []).append(code)
    documented: dict[int | str, dict[str, Any]] = {}
    for status, names in sorted(codes.items()):
        documented[status] = {"model": Problem, "description": ", ".join(f"`{name}`" for name in sorted(names))}
        if status in (429, 503):
            documented[status]["headers"] = {
                "Retry-After": {
                    "schema": {"type": "integer"},
                    "description": "Seconds until a new attempt is worth it.",
                }
            }
    return documented
