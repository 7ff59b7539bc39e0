"""Waiting for pictures as long as somebody waits for the answer: a client that leaves calls its pictures off."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from tdm_app.errors import ClientGone
from tdm_app.sse import disconnected, ended
from tdm_serve import GeneratedImage
from tdm_serve.ticket import Ticket


async def pictures_of(ticket: Ticket, receive: Receive) -> list[GeneratedImage]:
    """The ticket's pictures. Raises ClientGone when the connection is closed first, and what became of the ticket."""
    gone = asyncio.create_task(disconnected(receive))
    made = asyncio.create_task(ticket.result())
    try:
        await asyncio.wait({gone, made}, return_when=asyncio.FIRST_COMPLETED)
        if made.done():
            return made.result()
        raise ClientGone("the client closed the connection before its pictures were there")
    finally:
        ticket.cancel()  # nothing happens to one that is done
        await ended(gone)
        await ended(made)
