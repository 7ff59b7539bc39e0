"""One line in the log, one observation in the metrics and one span in the traces for every HTTP request."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tdm_app.errors import CLIENT_GONE
from tdm_app.logs import EXTRA
from tdm_app.metrics import Metrics
from tdm_app.tracing import Tracing

log = logging.getLogger("tdm_app.access")

RETRIES = "x-stainless-retry-count"  # OpenAI's clients count their attempts in it
OTHER = "other"  # the page's files, and paths that do not exist: one label, whatever a client makes up
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def note(request: Request, **facts: Any) -> None:
    """Adds facts to the request's line in the log."""
    request.scope.setdefault("state", {}).setdefault("facts", {}).update(facts)


def spent_ms(request: Request) -> float:
    """Milliseconds since the request came."""
    return (time.perf_counter() - request.scope["state"]["started"]) * 1000


class Access:
    """ASGI middleware, inside `RequestId`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, ended = time.perf_counter(), CLIENT_GONE, False
        scope.setdefault("state", {})["started"] = started

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))

        with self.metrics.in_flight.track_inprogress(), self.tracing.request(scope) as span:
            try:
                await self.app(scope, receive, watched)
            except Exception:
                status, ended = 500, True  # `RequestId` answers it
                raise
            finally:
                status = status if ended else CLIENT_GONE  # an answer that stopped half-way had nobody to read it
                span.end(route_of(scope), status)
                self._over(scope, status, time.perf_counter() - started)

    def _over(self, scope: Scope, status: int, seconds: float) -> None:
        retry = Headers(scope=scope).get(RETRIES, "0") != "0"
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self.metrics.answered(method, route_of(scope), status, seconds, retry=retry)
        facts = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(seconds * 1000, 2)}
        log.info("request", extra={EXTRA: facts | scope.get("state", {}).get("facts", {})})


def route_of(scope: Scope) -> str:
    """The path with its parameters' names in place of their values."""
    return str(getattr(scope.get("route"), "path", OTHER))
