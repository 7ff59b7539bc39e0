"""Server-sent events: how they are written, kept alive while nothing happens, ended when nobody listens any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tdm_app.errors import problem_of

KEEP_ALIVE = b": keep-alive\n\n"  # a comment: proxies see traffic, clients see nothing
KEEP_ALIVE_S = 10.0


def event(name: str, data: str, number: int | None = None) -> bytes:
    """One event. `data` is JSON without line breaks; `number` lets a client say where it was cut off."""
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {name}\ndata: {data}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """An error in the middle of a stream, which OpenAI's clients raise. Without it a stream seems to end well."""
    return f"data: {json.dumps(problem_of(error).body(), ensure_ascii=False)}\n\n".encode()


async def kept_alive(events: AsyncGenerator[bytes], interval_s: float = KEEP_ALIVE_S) -> AsyncGenerator[bytes]:
    """The events, with a comment whenever none has come for `interval_s`. Closes `events` at the end."""
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({following}, timeout=interval_s)
            if not done:
                yield KEEP_ALIVE
                continue
            task, following = following, None
            try:
                chunk = task.result()
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        if following is not None:
            await ended(following)
        await events.aclose()


async def _next(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits until it is over, whatever its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection. Only for requests whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer of events. They are closed as soon as the client is gone, so that they can call off their work."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None) -> None:
        quiet = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy must pass events on at once
        self.events = events
        self.status_code = 200
        self.background = None
        self.init_headers({**quiet, **(headers or {})})

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()  # raises what went wrong
        finally:
            await ended(gone)
            await ended(writing)
            await self.events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.events:
            await send(_body(chunk, more=True))
        await send(_body(b"", more=False))


def _body(chunk: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}
