"""`GET /v1/models` and `GET /v1/models/{id}`: one model is loaded, so the list has one entry."""

from __future__ import annotations

from fastapi import APIRouter

from tdm_app.schemas import ErrorResponse, ModelCard, ModelList
from tdm_app.service import Service


def models_router(service: Service) -> APIRouter:
    """What is loaded, and what it takes."""
    router = APIRouter(prefix="/v1/models", tags=["models"], responses={"default": {"model": ErrorResponse}})

    @router.get("")
    async def list_models() -> ModelList:  # pyright: ignore[reportUnusedFunction]
        """The loaded model."""
        return ModelList(data=[_card(service)])

    @router.get("/{model:path}")
    async def get_model(model: str) -> ModelCard:  # pyright: ignore[reportUnusedFunction]
        """The loaded model by its id, or 404."""
        service.must_be(model)
        return _card(service)

    return router


def _card(service: Service) -> ModelCard:
    info = service.info
    return ModelCard(
        id=info.id,
        created=service.created,
        description=info.description,
        family=info.family,
        checkpoint_hash=info.checkpoint_hash,
        nfe=info.nfe,
        size=f"{info.width}x{info.height}",
        size_multiple=info.size_multiple,
        min_side=info.min_side,
        max_side=info.max_side,
        max_prompt_tokens=info.max_prompt_tokens,
    )
