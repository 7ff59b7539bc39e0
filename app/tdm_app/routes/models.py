"""`GET /v1/models` and `GET /v1/models/{id}`: every served version of the checkpoint, the default first."""

from __future__ import annotations

from fastapi import APIRouter

from tdm_app.asking import chosen
from tdm_app.schemas import ErrorResponse
from tdm_app.schemas_info import ModelCard, ModelList
from tdm_app.service import Service
from tdm_serve import ModelInfo
from tdm_serve.validation import scale_of


def models_router(service: Service) -> APIRouter:
    """What is served, and what it takes."""
    router = APIRouter(prefix="/v1/models", tags=["models"], responses={"default": {"model": ErrorResponse}})

    @router.get("")
    async def list_models() -> ModelList:  # pyright: ignore[reportUnusedFunction]
        """The served models, the default first."""
        return ModelList(data=[_card(service, info) for info in service.infos.values()])

    @router.get("/{model:path}")
    async def get_model(model: str) -> ModelCard:  # pyright: ignore[reportUnusedFunction]
        """A served model by its id, or 404."""
        return _card(service, chosen(service.infos, model))

    return router


def _card(service: Service, info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.id,
        created=service.created,
        description=info.description,
        family=info.family,
        checkpoint_hash=info.checkpoint_hash,
        nfe=info.nfe,
        sigmas=list(info.sigmas),
        steps=len(info.sigmas),
        free_steps=info.free_steps,
        guidance_scale=scale_of(info.guidance, info.guidance_off),
        guidance_off=info.guidance_off,
        adapter=info.adapter,
        size=f"{info.width}x{info.height}",
        size_multiple=info.size_multiple,
        min_side=info.min_side,
        max_side=info.max_side,
        max_prompt_tokens=info.max_prompt_tokens,
    )
