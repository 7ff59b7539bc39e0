"""The wire format of trainings from ratings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TrainingStatus = Literal["running", "succeeded", "failed", "cancelled", "interrupted"]


class TrainingRequest(BaseModel):
    """Body of `POST /v1/training`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None, description="The version to train further; null is that with the most new ratings.", min_length=1
    )


class TrainingCard(BaseModel):
    """A training. Times are Unix seconds."""

    id: str
    object: Literal["training"] = "training"
    status: TrainingStatus
    model: str = Field(description="That is trained further.")
    version: str = Field(description="What comes of it, which requests can name as `model` once it is loaded.")
    ratings: int
    groups: int = Field(description="Prompts with pictures that were rated differently.")
    step: int = Field(description="Updates done, as far as the trainer has told.")
    steps: int = Field(description="Updates in all; 0 before the trainer has begun.")
    created_at: float
    finished_at: float | None
    loaded: bool
    error: str | None


class MaterialCard(BaseModel):
    """What a version could be trained from."""

    model: str
    pictures: int
    groups: int = Field(description="Prompts with pictures that were rated differently.")
    new_ratings: int = Field(description="Since its last training.")


class TrainingList(BaseModel):
    """Answer of `GET /v1/training`: the newest first."""

    object: Literal["list"] = "list"
    enabled: bool
    min_ratings: int = Field(description="New ratings of a version after which a training begins by itself.")
    material: list[MaterialCard]
    data: list[TrainingCard]
