"""What every request and answer has: an id, one measurement, and an answer whatever happens. Pure ASGI."""

from __future__ import annotations

import logging
import os
import re
import time

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import INTERNAL, problem_body
from app.observability.metrics import Metrics

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Envelope:
    """Gives every request an id, counts and times it, and turns what nobody caught into one traceback and a bare 500.

    The caller's `X-Request-Id` is kept if it is 1 to 128 harmless characters, else replaced.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        wanted = Headers(scope=scope).get("x-request-id", "")
        request_id = wanted if _REQUEST_ID.fullmatch(wanted) else os.urandom(16).hex()
        scope["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499  # the client left; there is nobody to answer
        except Exception:  # the last line: whatever it was, the caller gets an answer and the log its traceback
            logger.exception("request %s failed", request_id)
            if status:
                raise  # half an answer cannot be taken back: the server closes the connection
            body = problem_body("internal error", INTERNAL[1], request_id)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send_with_id({"type": "http.response.start", "status": INTERNAL[0], "headers": headers})
            await send_with_id({"type": "http.response.body", "body": body})
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.observe_request(scope["method"], route, status, time.perf_counter() - started)
