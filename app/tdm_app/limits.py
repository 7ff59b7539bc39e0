"""What a request may bring with it: how many bytes, and of which media type. Checked before any route runs.

The body is read here, up to the limit, and handed on whole. What comes beyond the limit is thrown away while it
arrives, so that memory stays flat and the client gets to read its 413 instead of a broken connection.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tdm_app.errors import CLIENT, Kind, Problem

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on one request. Up to `discard_bytes` beyond `body_bytes` are read and dropped, then the line is cut."""

    body_bytes: int = MIB
    discard_bytes: int = 16 * MIB


class BodyLimit:
    """ASGI middleware: 415 for a body on /v1 that is not JSON, 413 for one over the limit."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            return await self.app(scope, receive, send)
        body, size = await self._read(receive)
        if body is None:
            return None  # the client left before the end; nobody is there to be answered
        refused = self._refusal(scope, size)
        if refused is not None:
            return await refused.response()(scope, receive, send)
        return await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> tuple[bytes | None, int]:
        """The body, cut at the limit, and how many bytes came. None when the client disconnected."""
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= self.limits.body_bytes + self.limits.discard_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, size
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size <= self.limits.body_bytes:
                chunks.append(chunk)
            more = bool(message.get("more_body", False))
        return b"".join(chunks), size

    def _refusal(self, scope: Scope, size: int) -> Problem | None:
        if size > self.limits.body_bytes:
            kind = Kind(413, CLIENT, "body_too_large", {"connection": "close"})
            return Problem(kind, f"the body is over the limit; allowed: at most {self.limits.body_bytes} bytes")
        media_type = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if size and scope["path"].startswith("/v1/") and media_type != "application/json":
            named = f"content-type is {media_type!r}" if media_type else "content-type is missing"
            return Problem(Kind(415, CLIENT, "unsupported_media_type"), f"{named}; allowed: application/json")
        return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one piece, then whatever the connection says."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
