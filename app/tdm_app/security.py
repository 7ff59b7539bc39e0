"""What a browser must not be talked into, and the layers around the app in the right order.

Pages of other origins may not call us (CORS is closed, and what changes something is refused before it runs), a name
that somebody points at this machine is not ours (DNS rebinding), and the page runs no script but its own.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tdm_app.auth import Authenticate
from tdm_app.drain import Drain, Draining
from tdm_app.errors import Problem
from tdm_app.ratelimit import Limiter, RateLimit
from tdm_app.refusal import install_refusals, refusal
from tdm_app.settings import Settings
from tdm_app.state import State

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# gradio's page starts from inline scripts and styles and makes workers and pictures from blobs; nothing is loaded from
# other hosts, and nobody may frame it.
PAGE_POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # links to pictures hold their signature
    "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in PAGE_POLICY.items()),
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
EXPOSED = ("retry-after", "retry-after-ms", "x-eta-ms", "x-request-id", "x-should-retry")


def install_security(app: FastAPI, settings: Settings, state: State) -> Limiter:
    """Adds, from the inside out: rate limits, keys, origins and hosts, CORS, headers, and the end of the service.

    `app.state.limiter` counts pictures, `app.state.drain` waits for what runs.
    Call it after the limits on bodies and before RequestId, which has to stay the outermost.
    """
    limiter = Limiter(settings)
    app.state.limiter = limiter
    app.state.drain = Drain()
    install_refusals(app)
    app.add_middleware(RateLimit, limiter=limiter)
    app.add_middleware(Authenticate, settings=settings, state=state)
    app.add_middleware(Origins, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=list(EXPOSED),
            max_age=600,
        )
    app.add_middleware(Draining, drain=app.state.drain)
    app.add_middleware(SecurityHeaders)
    return limiter


class Origins:
    """ASGI middleware: 421 for a host name that is not ours, 403 for what a page of another origin tries to change.

    Without it a web page could use a service that asks for no key from within its reader's browser.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self.origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"}:
            problem = self._problem(scope, Headers(scope=scope))
            if problem is not None:
                return await problem.response()(scope, receive, send)
        return await self.app(scope, receive, send)

    def _problem(self, scope: Scope, headers: Headers) -> Problem | None:
        host = headers.get("host", "")
        if self.hosts and "*" not in self.hosts and _name(host) not in self.hosts:
            allowed = ", ".join(sorted(self.hosts))
            return refusal(421, "unknown_host", f"host is {host[:100]!r}; allowed: {allowed} (setting allowed_hosts)")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if changes and self._is_foreign(headers, host):
            origin = headers.get("origin", "")[:100]
            return refusal(403, "foreign_origin", f"origin is {origin!r}, another page's; see the setting cors_origins")
        return None

    def _is_foreign(self, headers: Headers, host: str) -> bool:
        """Whether a browser says that this comes from a page of another origin; programs say nothing of the kind."""
        origin = headers.get("origin")
        if origin in self.origins or "*" in self.origins:
            return False
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site not in {"same-origin", "none"}
        return origin is not None and urlsplit(origin).netloc.lower() != host.lower()


class SecurityHeaders:
    """ASGI middleware: the headers above on every answer that does not bring its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, sent if scope["type"] == "http" else send)


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
