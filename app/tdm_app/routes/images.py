"""`POST /v1/images/generations`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from tdm_app.asking import tenant_of, understand
from tdm_app.delivery import respond
from tdm_app.schemas import ErrorResponse, ImageRequest, ImagesResponse
from tdm_app.service import Service
from tdm_app.sse import EventStream, kept_alive
from tdm_app.streaming import image_events
from tdm_app.waiting import pictures_of

STREAM = {"description": "With `stream`: events `image_generation.partial_image`, `image_generation.completed`."}
RESPONSES = {200: {"content": {"text/event-stream": {"schema": {"type": "string", **STREAM}}}}}


def images_router(service: Service) -> APIRouter:
    """Text to pictures in OpenAI's shape."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post(
        "/generations", response_model=ImagesResponse, responses={**RESPONSES, "default": {"model": ErrorResponse}}
    )
    async def generate(body: ImageRequest, request: HttpRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Draws `n` pictures, as one answer or as events.

        The header `x-eta-ms` says in how many milliseconds they were predicted to be there when they were accepted.
        """
        asked = understand(body, service.model(body.model), service.settings, tenant_of(None, body.user))
        ticket = await service.submit(asked.requests, asked.terms, previews=body.partial_images > 0)
        headers = {"x-eta-ms": f"{ticket.eta_ms:.0f}"}
        if body.stream:
            events = image_events(service, body, asked, ticket)
            return EventStream(kept_alive(events, service.settings.keepalive_s), headers)
        answer = await respond(service, body, await pictures_of(ticket, request.receive))
        content = answer.model_dump_json(exclude_none=True)
        return Response(content, media_type="application/json", headers=headers)

    return router
