"""Who is asking. A middleware finds the caller of every request, and routes read it with `caller_of`.

Programs send `Authorization: Bearer KEY`. A browser cannot, so Basic with the key as the password does as well, which
a browser asks its user for when the page says so. Probes, the documentation and signed links need no key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Request
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tdm_app import keys
from tdm_app.errors import Problem
from tdm_app.refusal import Refused, refusal
from tdm_app.settings import Settings
from tdm_app.state import State

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json", "/robots.txt", "/favicon.ico"})
OPEN_PREFIXES = ("/v1/files/",)  # signed
ADMIN_PATHS = frozenset({"/metrics"})
REALM = 'realm="tdm-serve"'


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: `id` is the key's, empty without keys. What the owner of a job or a rating is called."""

    id: str = ""
    admin: bool = False
    address: str = ""

    @property
    def owner(self) -> str | None:
        """What to look things up by: None, which is everybody's, for an admin."""
        return None if self.admin else self.id

    @property
    def share(self) -> str:
        """Whose share of the device and of the rate limits a request comes from."""
        return self.id or self.address


def caller_of(request: Request) -> Caller:
    """The caller, for routes: as a dependency or called with the request."""
    caller = request.scope.get("state", {}).get("caller")
    return caller if isinstance(caller, Caller) else Caller()


def admin_of(request: Request) -> Caller:
    """The caller, who has to be an admin: 403 otherwise."""
    caller = caller_of(request)
    if not caller.admin:
        raise Refused(refusal(403, "admin_only", "this needs a key with the scope admin"))
    return caller


class Authenticate:
    """ASGI middleware: 401 without a key where one is needed, 403 where it is not an admin's, else `state["caller"]`.

    Without keys everybody is the same nameless caller, who is an admin unless the address is an open one.
    """

    def __init__(self, app: ASGIApp, settings: Settings, state: State) -> None:
        self.app = app
        self.state = state
        self.needed = settings.auth == "on"
        self.nobody_is_admin = settings.allow_open
        self.admin_key: SecretStr | None = settings.admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            return await self.app(scope, receive, send)
        caller = await self._caller(scope) if self.needed else Caller(admin=not self.nobody_is_admin)
        problem = self._problem(scope["path"], caller)
        if problem is not None:
            return await problem.response()(scope, receive, send)
        address = (scope.get("client") or ("",))[0]
        caller = caller or Caller()
        scope.setdefault("state", {})["caller"] = Caller(caller.id, caller.admin, address)
        return await self.app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller | None:
        text = _key_in(Headers(scope=scope).get("authorization", ""))
        if not text:
            return None
        own = self.admin_key.get_secret_value() if self.admin_key else ""
        if own and hmac.compare_digest(text.encode(), own.encode()):
            return Caller("admin_key", admin=True)
        key = await self.state.read(keys.verify, text)
        return Caller(key.id, key.scope == "admin") if key else None

    def _problem(self, path: str, caller: Caller | None) -> Problem | None:
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
            return None
        if caller is None:
            return refusal(401, "invalid_api_key", MISSING, headers=_challenge(path))
        if path in ADMIN_PATHS and not caller.admin:
            return refusal(403, "admin_only", f"{path} needs a key with the scope admin")
        return None


MISSING = "an API key is missing or not valid; send one as `Authorization: Bearer KEY`"


def _challenge(path: str) -> Mapping[str, str]:
    """What to send instead. A browser that opens the page understands Basic only."""
    scheme = "Bearer" if path.startswith("/v1") or path in ADMIN_PATHS else "Basic"
    return {"www-authenticate": f"{scheme} {REALM}"}


def _key_in(header: str) -> str:
    """The key in an Authorization header, empty where there is none."""
    scheme, _, value = header.strip().partition(" ")
    value = value.strip()
    match scheme.lower():
        case "bearer":
            return value
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return ""
        case _:
            return ""
