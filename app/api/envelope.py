"""What every request and answer has: an id, one measurement, and an answer whatever happens. Pure ASGI."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.drain import Drain
from app.api.errors import INTERNAL, problem_body, problem_response
from app.api.routing import Handler
from app.api.security import Keys, needed_scope
from app.api.security import Scope as KeyScope
from app.errors import Draining, ServiceError
from app.observability.metrics import Metrics

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True)
class HotPattern:
    """Paths with parameters in them that have one handler, and the route that metrics count them under."""

    expression: re.Pattern[str]
    route: str
    handler: Handler


class Envelope:
    """Gives every request an id, counts and times it, and turns what nobody caught into one traceback and a bare 500.

    Requests to the paths in `hot`, and to those that one of `hot_patterns` matches whole, go straight to their
    handlers; routing and its middleware cost more than most of them. All others go through `app`. The caller's
    `X-Request-Id` is kept if it is 1 to 128 harmless characters. Who may not ask, and who asks while the service is
    leaving for good, is told so here.
    """

    def __init__(
        self,
        app: ASGIApp,
        hot: Mapping[str, Handler],
        hot_patterns: Sequence[HotPattern],
        metrics: Metrics,
        keys: Keys,
        drain: Drain,
    ) -> None:
        self._app = app
        self._hot = hot
        self._hot_patterns = hot_patterns
        self._metrics = metrics
        self._keys = keys
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        wanted = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = wanted if _REQUEST_ID.fullmatch(wanted) else os.urandom(16).hex().encode()
        scope["request_id"] = request_id.decode("latin-1")
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if self._drain.has_begun:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        path: str = scope["path"]
        handler = self._hot.get(path) if scope["method"] == "POST" else None
        if handler is None and scope["method"] == "POST" and (match := self._match(path)):
            handler, path, scope["path_params"] = match
        try:
            if handler is None:
                if (refusal := self._refusal(scope, path)) is None:
                    await self._app(scope, receive, send_with_id)
                else:
                    await problem_response(Request(scope), refusal)(scope, receive, send_with_id)
                path = getattr(scope.get("route"), "path", "unmatched")
            else:
                request = Request(scope, receive)
                try:
                    if self._keys.are_set or self._drain.is_closed:
                        self._admit(scope, KeyScope.INFER)
                    response = await handler(request)
                except ServiceError as error:
                    response = problem_response(request, error)
                await response(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499  # the client left; there is nobody to answer
        except Exception:  # the last line: whatever it was, the caller gets an answer and the log its traceback
            logger.exception("request %s failed", scope["request_id"])
            if status:
                raise  # half an answer cannot be taken back: the server closes the connection
            body = problem_body("internal error", INTERNAL[1], scope["request_id"])
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send_with_id({"type": "http.response.start", "status": INTERNAL[0], "headers": headers})
            await send_with_id({"type": "http.response.body", "body": body})
        finally:
            self._metrics.observe_request(scope["method"], path, status, time.perf_counter() - started)

    def _match(self, path: str) -> tuple[Handler, str, dict[str, str | None]] | None:
        """Handler, route and parameters of the hot pattern that the path follows."""
        for pattern in self._hot_patterns:
            if found := pattern.expression.fullmatch(path):
                return pattern.handler, pattern.route, found.groupdict()
        return None

    def _refusal(self, scope: Scope, path: str) -> ServiceError | None:
        """Why a request that has no handler of its own is not even routed."""
        try:
            self._admit(scope, needed_scope(path))
        except ServiceError as error:
            return error
        return None

    def _admit(self, scope: Scope, needed: KeyScope | None) -> None:
        self._keys.check(dict(scope["headers"]), needed)
        if self._drain.is_closed and needed is not None:
            raise Draining("the service is shutting down", retry_after_s=1)
