"""Which ratings a version can be trained from: pictures that it made itself, by its own schedule and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdm_app.feedback_table import Rating
from tdm_app.online.groups import Groups, count_groups
from tdm_serve import ModelInfo

OFF = 1.0  # the weight of guidance that is off: few-step students are sampled without


@dataclass(frozen=True, slots=True)
class Material:
    """Ratings of one version's pictures; `fresh` of them were given after a moment."""

    ratings: tuple[Rating, ...]
    groups: Groups
    fresh: int


def is_trainable(info: ModelInfo) -> bool:
    """Whether TDM-R1 goes on from it: from few-step students, which need no guidance."""
    return info.guidance == OFF


def material_of(ratings: Sequence[Rating], info: ModelInfo, since_s: float) -> Material:
    """What a training of `info` would take, by the trainer's own rule."""
    mine = tuple(rating for rating in ratings if rating.usable and _is_own(rating, info))
    groups = count_groups((rating.record() for rating in mine), info.checkpoint_hash)
    return Material(mine, groups, sum(rating.created_s > since_s for rating in mine))


def _is_own(rating: Rating, info: ModelInfo) -> bool:
    recipe = rating.recipe
    made = recipe["checkpoint_hash"], recipe["sigmas"], recipe["guidance"], recipe["width"], recipe["height"]
    return made == (info.checkpoint_hash, list(info.sigmas), OFF, info.width, info.height)
