"""Puts the page under `/` without letting it answer for the API.

Mounting it in the router would make it the answer to every unknown path and every wrong method, in its own error
shapes. So it is the router's last resort instead, and only for the paths that the page consists of.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tdm_app.online.trainer import OnlineTraining
from tdm_app.page import CSS, SCRIPT, build_page
from tdm_app.service import Service
from tdm_serve.errors import MissingExtra

# First parts of the paths that gradio serves for a page. Its upload endpoint is left out: the page takes no files.
ROOTS = frozenset({
    "", "assets", "config", "favicon.ico", "gradio_api", "manifest.json", "robots.txt", "static", "svelte", "theme.css",
})  # fmt: skip
PROTOCOL = "/gradio_api/"  # what the page's script says to the server; it expects gradio's own errors
CLOSED = "/gradio_api/upload"
OFF = "The web page is switched off. The API is under /v1, its documentation under /docs.\n"


class PageFallback:
    """ASGI app that the router falls back to: the page for its paths, `otherwise` for all others."""

    def __init__(self, page: ASGIApp, otherwise: ASGIApp, stopping: asyncio.Event) -> None:
        self.page = page
        self.otherwise = otherwise
        self.stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if scope["type"] == "http" and path.split("/")[1] in ROOTS and not path.startswith(CLOSED):
            # A copy, since the page is an app of its own: it must not look up routes and state in ours.
            inner = {key: value for key, value in scope.items() if key not in {"app", "router"}}
            return await self._until_stopped(inner, receive, send)
        return await self.otherwise(scope, receive, send)

    async def _until_stopped(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Open browser tabs hold endless streams; they end as soon as the server stops, so that it can."""
        answer = _Answer(send, keep_errors=scope["path"].startswith(PROTOCOL))
        page = asyncio.ensure_future(self.page(scope, receive, answer.send))
        stopped = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({page, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            page.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await page
        await answer.finish()


class _Answer:
    """Passes the page's answer on. Errors are held back and raised in our own shape, except in gradio's protocol."""

    def __init__(self, send: Send, keep_errors: bool) -> None:
        self._send = send
        self._keep_errors = keep_errors
        self._refused: HTTPException | None = None
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400 and not self._keep_errors:
            allow = Headers(raw=message["headers"]).get("allow")
            self._refused = HTTPException(message["status"], headers={"allow": allow} if allow else None)
        if self._refused is None:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def finish(self) -> None:
        """Ends a stream that was cut off, and raises an error that was held back."""
        if self._refused is not None:
            raise self._refused
        if not self._ended:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def mount_page(app: FastAPI, service: Service, online: OnlineTraining) -> contextlib.AbstractAsyncContextManager[None]:
    """Adds the page, or where gradio is missing a line that says how to get it. Returns the page's lifespan."""
    if importlib.util.find_spec("gradio") is None:
        mount_note(app, str(MissingExtra("The web page", "demo")) + "\n")
        return contextlib.nullcontext()
    _use_private_cache()
    gr: Any = importlib.import_module("gradio")
    host, page = FastAPI(openapi_url=None), build_page(service, online, getattr(app.state, "limiter", None))
    script = f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"
    gr.mount_gradio_app(
        host, page, path="/", footer_links=[], run_history=False, show_error=False, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=_theme(gr), css_paths=CSS, head=script,
    )  # fmt: skip
    app.router.default = PageFallback(host, app.router.not_found, service.stopping)
    return _lifespan(host)


def mount_note(app: FastAPI, text: str = OFF) -> None:
    """Answers `/` with a line of text where there is no page."""

    async def note() -> PlainTextResponse:
        return PlainTextResponse(text)

    app.add_api_route("/", note, include_in_schema=False)


@contextlib.asynccontextmanager
async def _lifespan(host: FastAPI) -> AsyncGenerator[None]:
    async with host.router.lifespan_context(host):
        yield


def _theme(gr: Any) -> Any:
    """A quiet look with the system's own fonts, so that nothing is fetched."""
    sans = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    return gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", radius_size="md", font=sans, font_mono=mono)


@functools.cache
def _use_private_cache() -> None:
    """Gradio keeps shown pictures in one folder for all users of a machine, which fails for the second of them.

    Ours is private to the process and goes away with it, unless somebody has chosen a folder.
    """
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="tdm-serve-page-")
        os.environ["GRADIO_TEMP_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
