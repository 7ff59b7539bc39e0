"""Thumbs: what people think of pictures, kept only where the operator has said so (setting `feedback`).

What is kept is the recipe (prompt, seed, checkpoint, sigma table), no pixels. Whoever gave a rating can have it
deleted, also after the switch was turned off again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tdm_app import feedback_table
from tdm_app.errors import NotFound
from tdm_app.feedback_table import DISLIKE, LIKE, Rating
from tdm_app.job_table import new_id
from tdm_app.refusal import Refused, refusal
from tdm_app.settings import DAY_S, Settings
from tdm_app.state import State
from tdm_serve import GeneratedImage
from tdm_serve.errors import InvalidRequest, OutputError

log = logging.getLogger(__name__)

OFF = "feedback is switched off here, so nothing is kept; the setting `feedback` switches it on"


class Feedback:
    """The ratings of one service. An `owner` is the id of the key that asks, empty without keys."""

    def __init__(self, state: State, settings: Settings) -> None:
        self.state = state
        self.on = settings.feedback
        self.on_change: Callable[[], None] = _nothing  # called after every rating
        self._days = settings.picture_retention_s / DAY_S

    async def remember(self, recipes: Mapping[str, Mapping[str, Any]], owner: str = "") -> None:
        """Makes pictures known by id, so that they can be rated. Does nothing where feedback is off.

        A full disk is logged only: a picture that cannot be rated is better than none.
        """
        if self.on and recipes:
            await self._remember(recipes, owner)

    async def ids(self, pictures: Sequence[GeneratedImage], owner: str = "") -> list[str | None]:
        """New ids under which these pictures can be rated; None where nobody can."""
        if not self.on:
            return [None] * len(pictures)
        recipes = {new_id("img"): picture.recipe() for picture in pictures}
        known = await self._remember(recipes, owner)
        return [image_id if known else None for image_id in recipes]

    async def rate(self, id: str, up: bool, owner: str = "") -> None:  # noqa: A002 - the API's name
        """Thumb up or down; the last word counts."""
        await self.give({id: LIKE if up else DISLIKE}, owner, owner)

    async def prefer(self, id: str, over: str, owner: str = "") -> None:  # noqa: A002 - the API's name
        """The picture `id` is liked and the picture `over`, of the same prompt, disliked."""
        await self.give({id: LIKE, over: DISLIKE}, owner, owner)

    async def give(self, ratings: Mapping[str, float], owner: str, sees: str | None) -> list[Rating]:
        """Stores ratings by image id under one new id. `sees` is whose pictures may be rated; None is everybody's.

        Refused (403) where feedback is off, NotFound for a picture that is not known, InvalidRequest for a preference
        between pictures of different prompts.
        """
        if not self.on:
            raise Refused(refusal(403, "feedback_off", OFF))
        recipes = {image_id: await self._recipe(image_id, sees) for image_id in ratings}
        if len({recipe["prompt"] for recipe in recipes.values()}) > 1:
            raise InvalidRequest("the two pictures have different prompts, so neither is better", "preferred_over")
        rows = await self.state.write(feedback_table.give, new_id("fb"), owner, ratings, recipes)
        self.on_change()
        return rows

    async def records(self) -> Sequence[Mapping[str, Any]]:
        """Everybody's ratings as `tdm-serve feedback export` writes them."""
        ratings = await self.state.read(lambda connection: list(feedback_table.everything(connection)))
        return [rating.record() for rating in ratings if rating.usable]

    async def listed(self, limit: int, after: str | None) -> tuple[list[Rating], bool]:
        """What was said under `limit` ids, the newest first, and whether there is more."""
        return await self.state.read(feedback_table.listed, limit, after)

    async def delete(
        self, *, feedback_id: str | None = None, image_id: str | None = None, owner: str | None = None
    ) -> int:
        """Deletes what fits, so that it is in no file any more; how many ratings that were."""
        assert not feedback_id == image_id == owner is None
        count = await self.state.write(feedback_table.delete, feedback_id=feedback_id, image_id=image_id, owner=owner)
        await self.state.empty_log()
        return count

    async def _remember(self, recipes: Mapping[str, Mapping[str, Any]], owner: str) -> bool:
        try:
            await self.state.remember(recipes, owner)
        except OutputError as error:
            log.error("%d pictures cannot be rated: %s", len(recipes), error)
            return False
        return True

    async def _recipe(self, image_id: str, sees: str | None) -> dict[str, Any]:
        picture = await self.state.picture(image_id, sees)
        if picture is None:
            raise NotFound(
                f"there is no picture {image_id[:100]!r} of yours to rate; answers hold the ids, "
                f"which are good for {self._days:g} days"
            )
        return picture.recipe


def _nothing() -> None:
    """Default of `on_change`."""
