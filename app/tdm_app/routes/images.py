"""`POST /v1/images/generations`."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from tdm_app.access import note, spent_ms
from tdm_app.asking import facts_of, tenant_of, understand
from tdm_app.auth import caller_of
from tdm_app.delivery import respond
from tdm_app.ratelimit import Limiter
from tdm_app.schemas import ErrorResponse, ImageRequest, ImagesResponse
from tdm_app.service import Service
from tdm_app.sse import EventStream, kept_alive
from tdm_app.streaming import image_events
from tdm_app.tracing import trace_pictures
from tdm_app.waiting import pictures_of, while_connected

STREAM = {"description": "With `stream`: `image_generation.partial_image`, then `image_generation.completed`."}
RESPONSES = {200: {"content": {"text/event-stream": {"schema": STREAM}}}}


def images_router(service: Service, limiter: Limiter) -> APIRouter:
    """Text to pictures in OpenAI's shape."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post(
        "/generations", response_model=ImagesResponse, responses={**RESPONSES, "default": {"model": ErrorResponse}}
    )
    async def generate(body: ImageRequest, request: HttpRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Draws `n` pictures, as one answer or as events.

        The header `x-eta-ms` says in how many milliseconds they were predicted to be there when they were accepted. A
        stream that begins before the model is warm has none.
        """
        caller = caller_of(request)
        asked = understand(body, service.infos, service.settings, tenant_of(caller, body.user))
        limiter.pictures(caller, body.n)
        asked_ns = time.time_ns()
        if body.stream and service.warming:
            for one in asked.requests:
                service.engine.check(one)  # what is wrong is a plain error even now
            note(request, **facts_of(body, asked, service.settings))
            return EventStream(
                kept_alive(image_events(service, body, asked, None, request), service.settings.keepalive_s)
            )
        warm = service.ready
        submit = service.submit(asked.requests, asked.terms, previews=body.partial_images > 0)
        ticket = await while_connected(submit, request.receive)
        eta_ms = ticket.promised_ms + service.outside.ms
        headers = {"x-eta-ms": f"{eta_ms:.0f}"}
        note(request, **facts_of(body, asked, service.settings), eta_ms=round(eta_ms, 1))
        if body.stream:
            events = image_events(service, body, asked, ticket, request)
            return EventStream(kept_alive(events, service.settings.keepalive_s), headers)
        pictures, made_ns = await pictures_of(ticket, request.receive), time.time_ns()
        base_url = service.base_url(request)
        answer = await respond(service, body, pictures, owner=caller.id, base_url=base_url)
        trace_pictures(request, pictures, asked_ns, made_ns)
        content = answer.model_dump_json(exclude_none=True)
        if warm and ticket.took_ms is not None:
            service.outside.add(spent_ms(request) - ticket.took_ms)
        return Response(content, media_type="application/json", headers=headers)

    return router
