"""Stopping without losing anything: what runs is finished, what comes is refused with 503, then the server goes.

The port stays open meanwhile, so that clients read a sentence and not a broken connection.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from tdm_app.errors import SERVER, SOON_MS, Kind, Problem

STOPPING = Problem(
    Kind(503, SERVER, "unavailable", {"connection": "close"}, SOON_MS),
    "the service is stopping: it finishes what it has begun and takes nothing new",
)
ALIVE = frozenset({"/healthz"})


class Drain:
    """Counts the requests that run, and knows when to take no more."""

    def __init__(self) -> None:
        self.stopping = False
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        self.running += 1
        self._idle.clear()

    def end(self) -> None:
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def finish(self, timeout_s: float) -> bool:
        """Takes no more from now on, and waits for what runs. False where that took too long."""
        self.stopping = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class Draining:
    """ASGI middleware around everything that answers requests."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.drain.stopping and not _may_come(scope):
            return await STOPPING.response()(scope, receive, send)
        self.drain.begin()
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.end()


def _may_come(scope: Scope) -> bool:
    """What needs no device: the sign of life, and fetching what is done."""
    path: str = scope["path"]
    return path in ALIVE or (scope["method"] == "GET" and path.startswith(("/v1/jobs/", "/v1/files/")))
