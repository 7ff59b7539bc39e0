"""The wire format of ratings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Thumb = Literal["up", "down"]
MAX_ID = 100


class FeedbackRequest(BaseModel):
    """Body of `POST /v1/feedback`: a thumb for a picture, or which of two pictures of one prompt is better."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_id: str = Field(
        description="Of a picture in an answer of this service.", min_length=1, max_length=MAX_ID, examples=["img_1"]
    )
    rating: Thumb | None = Field(None, description="What you think of it.", examples=["up"])
    preferred_over: str | None = Field(
        None, description="In place of a rating: the id of the picture that is worse.", min_length=1, max_length=MAX_ID
    )


class RatedPicture(BaseModel):
    """One picture's rating."""

    image_id: str
    rating: Thumb


class FeedbackAnswer(BaseModel):
    """What was stored. Its id deletes it."""

    id: str
    object: Literal["feedback"] = "feedback"
    created: int
    ratings: list[RatedPicture]


class StoredRating(BaseModel):
    """A rating as an admin sees it."""

    id: str
    object: Literal["feedback"] = "feedback"
    created: int
    image_id: str
    rating: Thumb
    owner: str = Field(description="Id of the API key that it was given with; empty without keys.")
    recipe: dict[str, Any]


class FeedbackList(BaseModel):
    """Answer of `GET /v1/feedback`: the newest first."""

    object: Literal["list"] = "list"
    data: list[StoredRating]
    has_more: bool


class FeedbackDeleted(BaseModel):
    """What is gone."""

    object: Literal["feedback.deleted"] = "feedback.deleted"
    deleted: int = Field(description="How many ratings.")
