"""The two probes: alive (the process answers) and ready (the model is warm, so a request meets no cold start)."""

from __future__ import annotations

from fastapi import APIRouter

from tdm_app.schemas import ErrorResponse
from tdm_app.schemas_info import Health
from tdm_app.service import Service


def health_router(service: Service) -> APIRouter:
    """`/healthz` and `/readyz`, for load balancers and orchestrators."""
    router = APIRouter(tags=["health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", response_model_exclude_none=True)
    async def healthz() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Alive: the process answers."""
        return Health(status="ok")

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", response_model_exclude_none=True, responses={503: {"model": ErrorResponse}})
    async def readyz() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Ready: the listed shapes are warm. 503 before that, while the device hangs, and while the service stops."""
        service.must_be_ready()
        return Health(status="ready", degraded=service.trouble)

    return router
