"""Waiting for pictures as long as somebody waits for the answer: a client that leaves calls its pictures off."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from tdm_app.errors import ClientGone
from tdm_app.sse import disconnected, ended
from tdm_serve import GeneratedImage
from tdm_serve.ticket import Ticket

T = TypeVar("T")


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What `work` returns or raises. It is cancelled, and ClientGone raised, when the connection is closed first."""
    gone = asyncio.create_task(disconnected(receive))
    done = asyncio.create_task(work)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise ClientGone("the client closed the connection before its pictures were there")
    finally:
        await ended(gone)
        await ended(done)


async def pictures_of(ticket: Ticket, receive: Receive) -> list[GeneratedImage]:
    """The ticket's pictures. Raises ClientGone when the connection is closed first, and what became of the ticket."""
    try:
        return await while_connected(ticket.result(), receive)
    finally:
        ticket.cancel()  # nothing happens to one that is done
