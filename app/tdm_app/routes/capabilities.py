"""`GET /v1/capabilities`: what this server can do, how fast, and within which limits."""

from __future__ import annotations

from fastapi import APIRouter

from tdm_app.schemas import MAX_DEADLINE_MS, ErrorResponse
from tdm_app.schemas_info import Capabilities, Features, GuidanceCard, Limits, ShapeCard
from tdm_app.service import Service
from tdm_serve import ModelInfo, __version__
from tdm_serve.core import MAX_PRIORITY, MIN_PRIORITY
from tdm_serve.stats import WarmShape
from tdm_serve.validation import MAX_ADAPTER_SCALE, MAX_GUIDANCE, MAX_STEPS, scale_of


def capabilities_router(service: Service) -> APIRouter:
    """What can be asked for here."""
    router = APIRouter(prefix="/v1", tags=["models"], responses={"default": {"model": ErrorResponse}})

    @router.get("/capabilities")
    async def capabilities() -> Capabilities:  # pyright: ignore[reportUnusedFunction]
        """Models, warm shapes with their predicted times, limits and features."""
        return Capabilities(
            version=__version__,
            ready=service.ready,
            degraded=service.trouble,
            models=list(service.infos),
            guidance={model: _guidance(info) for model, info in service.infos.items()},
            shapes=[_shape(shape) for shape in service.engine.capabilities()],
            limits=_limits(service),
            features=_features(service),
        )

    return router


def _guidance(info: ModelInfo) -> GuidanceCard:
    return GuidanceCard(default=scale_of(info.guidance, info.guidance_off), off=info.guidance_off)


def _shape(shape: WarmShape) -> ShapeCard:
    return ShapeCard(
        size=f"{shape.width}x{shape.height}",
        text_tokens=shape.text,
        guided=shape.guided,
        best_batch=shape.best_batch,
        predicted_ms={model: round(ms, 2) for model, ms in shape.alone_ms.items()},
    )


def _limits(service: Service) -> Limits:
    settings = service.settings
    return Limits(
        max_images=settings.max_images,
        max_steps=MAX_STEPS,
        max_guidance_scale=MAX_GUIDANCE,
        max_adapter_scale=MAX_ADAPTER_SCALE,
        max_prompt_characters=settings.max_prompt_chars,
        max_body_bytes=settings.max_body_bytes,
        max_deadline_ms=MAX_DEADLINE_MS,
        max_jobs=settings.max_jobs,
        min_priority=MIN_PRIORITY,
        max_priority=MAX_PRIORITY,
    )


def _features(service: Service) -> Features:
    settings = service.settings
    online = settings.feedback and settings.online_training
    return Features(feedback=settings.feedback, online_training=online, authentication=settings.auth == "on")
