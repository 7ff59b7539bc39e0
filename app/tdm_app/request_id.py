"""The outermost layer: every answer carries an `x-request-id`, and nothing that goes wrong leaves without one."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tdm_app.errors import problem_of
from tdm_app.logs import request_id as current_id

log = logging.getLogger(__name__)

HEADER = "x-request-id"
SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")  # safe in headers and in one line of a log


class RequestId:
    """ASGI middleware. Keeps the client's id when it is sane, else makes one; turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name = request_id(Headers(scope=scope).get(HEADER, ""))
        scope.setdefault("state", {})["request_id"] = name
        started = False

        async def stamped(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        token = current_id.set(name)
        try:
            await self.app(scope, receive, stamped)
        except Exception as error:
            log.exception("request %s: %s %s failed", name, scope["method"], scope["path"])
            if started:
                raise  # too late for an answer; the server has to cut the connection
            await problem_of(error).response()(scope, receive, stamped)
        finally:
            current_id.reset(token)


def request_id(wanted: str) -> str:
    """The client's own id if it is sane, else a new one."""
    return wanted if SANE.fullmatch(wanted) else f"req_{uuid.uuid4().hex}"
