"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from tdm_app.metrics import CONTENT_TYPE, Metrics

RESPONSES: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def metrics_router(metrics: Metrics) -> APIRouter:
    """The numbers of the service as text."""
    router = APIRouter(tags=["health"])

    @router.get("/metrics", response_class=Response, responses=RESPONSES)
    async def show() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Queue, batches, stages, promises, refusals, cache, memory and HTTP, in Prometheus' text format."""
        return Response(await asyncio.to_thread(metrics.text), headers={"content-type": CONTENT_TYPE})

    return router
