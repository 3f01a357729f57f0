"""What every request and answer has: an id, one measurement, and an answer whatever happens. Pure ASGI."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from app.api.dependencies import headers_of
from app.api.drain import Drain
from app.api.errors import INTERNAL, problem_body, problem_response
from app.api.in_flight import CONNECTION, Connection
from app.api.responses import Answer, send_whole
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
    handlers; routing and its middleware cost more than most of them. All others go through the application's own
    stack. The caller's `X-Request-Id` is kept if it is 1 to 128 harmless characters. Who may not ask, and who asks
    while the service is leaving for good, is told so here.

    Args:
        app: with all its routes; the envelope becomes its outermost layer, and can be served in its place.
        hot: handlers by path.
        hot_patterns: handlers of paths with parameters in them.
        metrics: count every request.
        keys: say who may ask.
        drain: whether the service is leaving.
    """

    def __init__(
        self,
        app: FastAPI,
        hot: Mapping[str, Handler],
        hot_patterns: Sequence[HotPattern],
        metrics: Metrics,
        keys: Keys,
        drain: Drain,
    ) -> None:
        stack = app.build_middleware_stack()
        # What its outermost layer does, answering what nobody caught, is done here.
        self._stack = stack.app if isinstance(stack, ServerErrorMiddleware) else stack
        app.middleware_stack = self
        self._app = app
        self._hot = hot
        self._hot_patterns = hot_patterns
        self._metrics = metrics
        self._keys = keys
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        scope["app"] = self._app
        if scope["type"] != "http":
            await self._stack(scope, receive, send)
            return
        started = time.perf_counter()
        wanted = headers_of(scope).get(b"x-request-id")
        kept = wanted is not None and _REQUEST_ID.fullmatch(wanted)
        request_id = wanted if wanted and kept else b"%032x" % random.getrandbits(128)
        scope["request_id"] = request_id.decode("latin-1")
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._added_headers(request_id)]
            await send(message)

        path: str = scope["path"]
        handler = self._hot.get(path) if scope["method"] == "POST" else None
        if handler is None and scope["method"] == "POST" and (match := self._match(path)):
            handler, path, scope["path_params"] = match
        try:
            if handler is None:
                await self._serve_routed(scope, receive, send_with_id)
                path = getattr(scope.get("route"), "path", "unmatched")
                return
            request = Request(scope, receive)
            try:
                if self._keys.are_set or self._drain.is_closed:
                    self._admit(scope, KeyScope.INFER)
                response = await handler(request)
            except ServiceError as error:
                response = problem_response(request, error)
            if not isinstance(response, Answer):
                await response(scope, receive, send_with_id)
                return
            status = response.status_code  # whole: nothing needs to be seen on its way
            headers = response.raw_headers
            headers += self._added_headers(request_id)
            connection: Connection | None = scope.get(CONNECTION)
            respond = send_whole if connection is None else connection.respond
            await respond(send, status, headers, response.body)
        except ClientDisconnect:
            status = status or 499  # the client left; there is nobody to answer
        except Exception:  # the last line: whatever it was, the caller gets an answer and the log its traceback
            logger.exception("request %s failed", scope["request_id"])
            if status:
                raise  # half an answer cannot be taken back: the server closes the connection
            await _answer_internal_error(scope, send_with_id)
        finally:
            self._metrics.observe_request(scope["method"], path, status, time.perf_counter() - started)

    async def _serve_routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All other paths, by way of the application's own stack."""
        refusal = self._refusal(scope, scope["path"])
        if refusal is None:
            await self._stack(scope, receive, send)
        else:
            await problem_response(Request(scope), refusal)(scope, receive, send)

    def _added_headers(self, request_id: bytes) -> list[tuple[bytes, bytes]]:
        """The headers that every answer has besides its own."""
        added = [(b"x-request-id", request_id)]
        if self._drain.has_begun:
            added.append((b"connection", b"close"))
        return added

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
        self._keys.check(headers_of(scope), needed)
        if self._drain.is_closed and needed is not None:
            raise Draining("the service is shutting down", retry_after_s=1)


async def _answer_internal_error(scope: Scope, send: Send) -> None:
    answer = Answer(problem_body("internal error", INTERNAL[1], scope["request_id"]), b"application/json")
    await send_whole(send, INTERNAL[0], answer.raw_headers, answer.body)
