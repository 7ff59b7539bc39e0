"""`stream: true`: predicted pictures while they get better, then the finished ones, as OpenAI's events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request

from tdm_app.asking import Asked
from tdm_app.auth import caller_of
from tdm_app.delivery import respond, usage_of
from tdm_app.encode import encode_preview, text_of
from tdm_app.errors import for_the_log
from tdm_app.schemas import CompletedEvent, ImageRequest, PartialImageEvent
from tdm_app.service import Service
from tdm_app.sse import error_event, event
from tdm_app.tracing import trace_pictures
from tdm_serve.core import GeneratedImage, Progress
from tdm_serve.ticket import Ticket

log = logging.getLogger(__name__)


def partial_steps(total: int, partials: int) -> tuple[int, ...]:
    """After which of `total` steps a predicted picture is sent: `partials` of them, spread evenly, never the last.

    Four steps and three partials give every step but the last, which the finished picture follows. With fewer steps
    than that there are fewer partials.
    """
    wanted = {round(index * total / (partials + 1)) for index in range(1, partials + 1)}
    return tuple(sorted(step for step in wanted if 1 <= step < total))


async def image_events(
    service: Service, body: ImageRequest, asked: Asked, ticket: Ticket | None, request: Request
) -> AsyncGenerator[bytes]:
    """The events of one request. An error becomes the last of them; leaving early calls the pictures off.

    Without a ticket they begin with the wait for one: until the model is warm.
    """
    asked_ns, owner = time.time_ns(), caller_of(request).id
    sent = dict.fromkeys(range(len(asked.requests)), 0)
    try:
        ticket = ticket or await service.submit(asked.requests, asked.terms, previews=body.partial_images > 0)
        async for progress in ticket.progress():
            if progress.preview is not None and progress.step in partial_steps(progress.total, body.partial_images):
                yield await _partial(body, asked, progress, sent[progress.index])
                sent[progress.index] += 1
        pictures, made_ns = await ticket.result(), time.time_ns()
        chunks = await _completed(service, body, pictures, owner)
        trace_pictures(request, pictures, asked_ns, made_ns)
        for chunk in chunks:
            yield chunk
    except Exception as error:
        if for_the_log(error):
            log.exception("a stream failed")
        yield error_event(error)
    finally:
        if ticket is not None:
            ticket.cancel()


async def _partial(body: ImageRequest, asked: Asked, progress: Progress, number: int) -> bytes:
    assert progress.preview is not None
    file = await asyncio.to_thread(
        encode_preview, progress.preview, asked.size, body.output_format, body.output_compression
    )
    about = _common(body, asked.size, progress.index)
    shown = PartialImageEvent(b64_json=text_of(file), partial_image_index=number, **about)
    return event(shown.type, shown.model_dump_json())


async def _completed(
    service: Service, body: ImageRequest, pictures: Sequence[GeneratedImage], owner: str
) -> list[bytes]:
    answer = await respond(service, body, pictures, owner=owner, base_url="")
    chunks: list[bytes] = []
    for index, (picture, data) in enumerate(zip(pictures, answer.data, strict=True)):
        about = _common(body, (picture.width, picture.height), index)
        mine = data.model_dump(exclude={"url"})
        done = CompletedEvent(usage=usage_of(service, [picture]), model=picture.model, **mine, **about)
        chunks.append(event(done.type, done.model_dump_json()))
    return chunks


def _common(body: ImageRequest, size: tuple[int, int], index: int) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": f"{size[0]}x{size[1]}",
        "quality": body.echoed_quality,
        "output_format": body.output_format,
        "image_index": index,
    }
