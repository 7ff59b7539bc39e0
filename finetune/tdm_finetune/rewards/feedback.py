"""People's likes as rewards: the record that the service writes, groups to train on, and the rating as a reward.

One JSON object a line (docs/rewards.md describes the keys). What is stored is the recipe of a picture, not its pixels:
prompt, seed, checkpoint and size make the same picture again, so the trainer replays a group exactly and needs nothing
but the ratings from here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_finetune.rewards.base import BadSample, Metadata, Reward
from tdm_serve.core import MAX_SEED
from tdm_serve.errors import ConfigError

REQUIRED = ("prompt", "seed", "model", "checkpoint_hash", "size", "like", "time")
OPTIONAL = ("sigmas", "guidance")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes a picture again. `sigmas` and `guidance` of None mean the checkpoint's own."""

    prompt: str
    seed: int
    checkpoint_hash: str
    width: int
    height: int
    sigmas: tuple[float, ...] | None = None
    guidance: float | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for pictures that differ in nothing but their seed."""
        return (self.prompt, self.checkpoint_hash, self.width, self.height, self.sigmas, self.guidance)


@dataclass(frozen=True, slots=True)
class Rated:
    """One rating of one picture. `rating` is in [-1, 1]; a like is 1 and a dislike -1."""

    recipe: Recipe
    model: str
    rating: float
    time: datetime

    def metadata(self) -> dict[str, Any]:
        """What the `feedback` reward looks a picture up by."""
        return {"recipe": self.recipe}


@dataclass(frozen=True, slots=True)
class Group:
    """Rated pictures of one prompt, checkpoint and size: what an advantage can be computed from."""

    model: str
    recipes: tuple[Recipe, ...]
    ratings: tuple[float, ...]

    @property
    def prompt(self) -> str:
        return self.recipes[0].prompt


def read_feedback(path: Path) -> list[Rated]:
    """The records of a JSON-lines file, in its order. ConfigError names the line and the value that does not fit."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the feedback file {path}: {error}") from error
    records: list[Rated] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(record(json.loads(line)))
            except ValueError as error:  # json's error is one
                raise ConfigError(f"{path}, line {number}: {error}") from error
    return records


def ratings(records: Iterable[Rated]) -> dict[Recipe, float]:
    """The mean rating of each picture, because several people may have rated it; in the order of first mention."""
    given: dict[Recipe, list[float]] = {}
    for rated in records:
        given.setdefault(rated.recipe, []).append(rated.rating)
    return {recipe: math.fsum(values) / len(values) for recipe, values in given.items()}


def groups(records: Iterable[Rated], minimum: int) -> list[Group]:
    """Groups of at least `minimum` rated pictures with at least two different ratings, in the order of first mention.

    A group in which everybody agrees teaches nothing: all its advantages are 0.
    """
    if minimum < 2:
        raise ConfigError(f"the least size of a feedback group is {minimum}; it must be at least 2")
    listed = list(records)
    models = {rated.recipe: rated.model for rated in listed}
    together: dict[tuple[Any, ...], list[tuple[Recipe, float]]] = {}
    for recipe, rating in ratings(listed).items():
        together.setdefault(recipe.group, []).append((recipe, rating))
    return [
        Group(models[members[0][0]], tuple(recipe for recipe, _ in members), tuple(rating for _, rating in members))
        for members in together.values()
        if len(members) >= minimum and len({rating for _, rating in members}) > 1
    ]


def feedback(path: Path) -> Reward:
    """The mean rating of the picture that was made from metadata["recipe"], in [-1, 1].

    `path` is the JSON-lines file. The picture itself is not looked at: it is the one that was rated, because recipe
    and checkpoint make it again. A picture that nobody rated raises an error, as 0 would be an opinion, too.
    """
    known = ratings(read_feedback(path))
    if not known:
        raise ConfigError(f"the feedback file {path} has no records")

    def reward(_images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        recipes = [_recipe(index, data) for index, data in enumerate(metadata)]
        for index, recipe in enumerate(recipes):
            if recipe not in known or recipe.prompt != prompts[index]:
                raise BadSample(index, f"{path} has no rating of its recipe {recipe}")
        return torch.tensor([known[recipe] for recipe in recipes])

    return reward


def record(data: Any) -> Rated:
    """One line's object. ValueError with the key and the value that does not fit."""
    if not isinstance(data, dict):
        raise ValueError(f"it is {type(data).__name__}; a record is an object")
    fields: dict[str, Any] = data
    missing = [key for key in REQUIRED if key not in fields]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing; a record has {', '.join(REQUIRED)}")
    unknown = [key for key in fields if key not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is unknown; a record has {', '.join(REQUIRED)}, and may have {', '.join(OPTIONAL)}"
        )
    return Rated(recipe_of(fields), _text(fields, "model"), _rating(fields["like"]), _time(fields["time"]))


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """The recipe in a record, or in metadata with the same keys. ValueError or KeyError for what does not fit."""
    seed: Any = data["seed"]
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"'seed' is {seed!r}; it must be a whole number from 0 to {MAX_SEED}")
    width, height = _size(data["size"])
    sigmas, guidance = data.get("sigmas"), data.get("guidance")
    if sigmas is not None and not (isinstance(sigmas, list | tuple) and sigmas and all(map(_is_number, sigmas))):
        raise ValueError(f"'sigmas' is {sigmas!r}; it must be a list of numbers")
    if guidance is not None and not _is_number(guidance):
        raise ValueError(f"'guidance' is {guidance!r}; it must be a number")
    return Recipe(
        _text(data, "prompt"),
        seed,
        _text(data, "checkpoint_hash"),
        width,
        height,
        None if sigmas is None else tuple(map(float, sigmas)),
        None if guidance is None else float(guidance),
    )


def _recipe(index: int, metadata: Metadata) -> Recipe:
    recipe: Any = metadata.get("recipe", metadata)
    if isinstance(recipe, Recipe):
        return recipe
    try:
        return recipe_of(recipe)
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample(index, f"its metadata holds no recipe: {type(error).__name__}: {error}") from error


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} is {value!r}; it must be text")
    return value


def _rating(value: Any) -> float:
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if not _is_number(value) or not -1 <= value <= 1:
        raise ValueError(f"'like' is {value!r}; it must be true, false or a number from -1 to 1")
    return float(value)


def _size(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"'size' is {value!r}; it must be WIDTHxHEIGHT in pixels, such as \"128x128\"")
    return int(match[1]), int(match[2])


def _time(value: Any) -> datetime:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        time = None
    if time is None or time.tzinfo is None:
        raise ValueError(f"'time' is {value!r}; it must be ISO 8601 with a zone, such as \"2026-11-22T15:04:05Z\"")
    return time


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
