"""`/v1/training`: versions trained from ratings while others are served. For admins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from tdm_app.auth import Caller, admin_of
from tdm_app.errors import AlreadyFinished
from tdm_app.online.table import Training
from tdm_app.online.trainer import OnlineTraining
from tdm_app.schemas import ErrorResponse
from tdm_app.schemas_training import MaterialCard, TrainingCard, TrainingList, TrainingRequest

Admin = Annotated[Caller, Depends(admin_of)]


def training_router(online: OnlineTraining) -> APIRouter:
    """Begin, watch, call off, and take what came of it into service."""
    router = APIRouter(prefix="/v1/training", tags=["training"], responses={"default": {"model": ErrorResponse}})

    def card(training: Training) -> TrainingCard:
        step, steps = online.progress(training)
        return TrainingCard(
            id=training.id,
            status=training.status,
            model=training.model,
            version=training.version,
            ratings=training.ratings,
            groups=training.groups,
            step=step,
            steps=steps,
            created_at=training.created_s,
            finished_at=training.finished_s,
            loaded=training.loaded,
            error=training.error,
        )

    @router.get("")
    async def list_trainings(_caller: Admin) -> TrainingList:  # pyright: ignore[reportUnusedFunction]
        """All trainings, the newest first, and what the next one could learn from."""
        material = [
            MaterialCard(model=name, pictures=one.groups.pictures, groups=one.groups.usable, new_ratings=one.fresh)
            for name, one in (await online.material()).items()
        ]
        data = [card(training) for training in await online.trainings()]
        return TrainingList(enabled=online.on, min_ratings=online.min_ratings, material=material, data=data)

    @router.post("", status_code=202)
    async def start_training(body: TrainingRequest, _caller: Admin) -> TrainingCard:  # pyright: ignore[reportUnusedFunction]
        """Begins one now, however few the ratings. 409 while another one runs."""
        return card(await online.start(body.model))

    @router.get("/{training_id}")
    async def get_training(training_id: str, _caller: Admin) -> TrainingCard:  # pyright: ignore[reportUnusedFunction]
        """How far one is."""
        return card(await online.find(training_id))

    @router.delete("/{training_id}")
    async def cancel_training(training_id: str, _caller: Admin) -> TrainingCard:  # pyright: ignore[reportUnusedFunction]
        """Ends one, and drops what it learned so far. 409 when it has ended."""
        if not await online.cancel(training_id):
            ended = await online.find(training_id)
            raise AlreadyFinished(f"training {ended.id} has {ended.status} already; only a running one is cancelled")
        return card(await online.find(training_id))

    @router.post("/{training_id}/load")
    async def load_training(training_id: str, _caller: Admin) -> TrainingCard:  # pyright: ignore[reportUnusedFunction]
        """Serves what came of one as a further version: requests can name its `version` as `model` from then on."""
        return card(await online.load(training_id))

    return router
