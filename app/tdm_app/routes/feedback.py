"""`/v1/feedback`: give a rating, have it deleted; admins see all."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from tdm_app.auth import Caller, admin_of, caller_of
from tdm_app.errors import NotFound
from tdm_app.feedback import Feedback
from tdm_app.feedback_table import DISLIKE, LIKE, Rating
from tdm_app.refusal import Refused, refusal
from tdm_app.schemas import ErrorResponse
from tdm_app.schemas_feedback import (
    MAX_ID,
    FeedbackAnswer,
    FeedbackDeleted,
    FeedbackList,
    FeedbackRequest,
    RatedPicture,
    StoredRating,
    Thumb,
)
from tdm_serve.errors import InvalidRequest

ME = "me"
MAX_LISTED = 1000
Asker = Annotated[Caller, Depends(caller_of)]
Admin = Annotated[Caller, Depends(admin_of)]
Id = Annotated[str | None, Query(min_length=1, max_length=MAX_ID)]


def feedback_router(feedback: Feedback) -> APIRouter:
    """Ratings, from which TDM-R1 trains."""
    router = APIRouter(prefix="/v1/feedback", tags=["feedback"], responses={"default": {"model": ErrorResponse}})

    @router.post("")
    async def give_feedback(body: FeedbackRequest, caller: Asker) -> FeedbackAnswer:  # pyright: ignore[reportUnusedFunction]
        """Rates a picture, or prefers it to another one of the same prompt. A later rating replaces an earlier one."""
        rows = await feedback.give(ratings_in(body), caller.id, caller.owner)
        ratings = [RatedPicture(image_id=row.image_id, rating=_thumb(row)) for row in rows]
        return FeedbackAnswer(id=rows[0].id, created=int(rows[0].created_s), ratings=ratings)

    @router.get("")
    async def list_feedback(  # pyright: ignore[reportUnusedFunction]
        _caller: Admin, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100, after: Id = None
    ) -> FeedbackList:
        """Everybody's ratings, for admins: what was said under `limit` ids, the newest first, from below `after` on."""
        rows, more = await feedback.listed(limit, after)
        return FeedbackList(data=[_stored(row) for row in rows], has_more=more)

    @router.delete("/{feedback_id}")
    async def delete_one(feedback_id: str, caller: Asker) -> FeedbackDeleted:  # pyright: ignore[reportUnusedFunction]
        """Deletes one's own rating; an admin anybody's."""
        count = await feedback.delete(feedback_id=feedback_id, owner=caller.owner)
        if not count:
            raise NotFound(f"there is no feedback {feedback_id[:MAX_ID]!r} of yours")
        return FeedbackDeleted(deleted=count)

    @router.delete("")
    async def delete_many(  # pyright: ignore[reportUnusedFunction]
        caller: Asker, image_id: Id = None, owner: Id = None
    ) -> FeedbackDeleted:
        """Deletes one's own ratings of a picture (`image_id`) or all of them (`owner=me`); an admin anybody's."""
        whose = caller.owner
        if owner is not None:
            whose = caller.id if owner == ME else owner
        elif image_id is None:
            raise InvalidRequest("nothing says what to delete; allowed: image_id, or owner=me", "image_id")
        if not caller.admin and whose != caller.id:
            raise Refused(refusal(403, "admin_only", "only a key with the scope admin deletes others' ratings"))
        return FeedbackDeleted(deleted=await feedback.delete(image_id=image_id, owner=whose))

    return router


def ratings_in(body: FeedbackRequest) -> dict[str, float]:
    """Image id -> rating. InvalidRequest unless the body says exactly one thing."""
    match body.rating, body.preferred_over:
        case None, None:
            raise InvalidRequest("nothing says what is thought of it; allowed: rating or preferred_over", "rating")
        case str(rating), None:
            return {body.image_id: LIKE if rating == "up" else DISLIKE}
        case None, str(other) if other != body.image_id:
            return {body.image_id: LIKE, other: DISLIKE}
        case None, _:
            raise InvalidRequest(f"preferred_over is {body.preferred_over!r}, the picture itself", "preferred_over")
        case _:
            raise InvalidRequest("rating and preferred_over are given; allowed: one of them", "preferred_over")


def _thumb(row: Rating) -> Thumb:
    return "up" if row.rating > 0 else "down"


def _stored(row: Rating) -> StoredRating:
    return StoredRating(
        id=row.id,
        created=int(row.created_s),
        image_id=row.image_id,
        rating=_thumb(row),
        owner=row.owner,
        recipe=row.recipe,
    )
