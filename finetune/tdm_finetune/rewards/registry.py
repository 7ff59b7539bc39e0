"""Rewards by name: the entry-point group `tdm_serve.rewards`, through which the built-ins come, too.

An entry point is a factory `(**options) -> Reward`. Only the chosen ones are imported.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from torch import Tensor

from tdm_finetune.rewards.base import Metadata, Part, Reward, Scores, check_batch, score, weighted
from tdm_finetune.rewards.options import Named, parse, typed
from tdm_serve.errors import ConfigError, MissingExtra

GROUP = "tdm_serve.rewards"
IN_EXTRA = {"scipy": "finetune"}  # package -> the extra that brings it


@dataclass(frozen=True, slots=True)
class Mixture:
    """A weighted sum of rewards; itself a reward. A part of weight 0 is computed and logged, and changes nothing."""

    parts: tuple[Part, ...]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return self.scores(images, prompts, metadata).total

    def scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        """The sum and the parts. Raises RewardError where a part fails or returns what is no score."""
        check_batch(images, prompts, metadata)
        return weighted(self.parts, {part.label: score(part, images, prompts, metadata) for part in self.parts})


def known() -> list[str]:
    """Names of the installed rewards, sorted."""
    return sorted(_points())


def load_reward(text: str) -> Mixture:
    """A reward or a weighted mixture from its short form, e.g. "scenes:1.0,aesthetic:0.2"; models load here.

    Raises ConfigError for what is not in the short form, unknown names and options, and missing weights.
    """
    named = parse(text)
    points = _points()
    for part in named:
        if part.name not in points:
            raise ConfigError(_unknown(part.name, sorted(points)))
    labels = _labels(named)
    return Mixture(
        tuple(
            Part(label, part.weight, _load(points[part.name], part)) for label, part in zip(labels, named, strict=True)
        )
    )


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint, part: Named) -> Reward:
    where = f"the reward {part.name!r}"
    try:
        factory: Callable[..., Any] = point.load()
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        if root in IN_EXTRA:
            raise MissingExtra(where, IN_EXTRA[root]) from error
        raise ConfigError(f"{where} is in {point.value}, which does not import: {error}") from error
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where} is in {point.value}, which does not import: {error}") from error
    made: Any = factory(**typed(part.name, factory, part.options))
    if not callable(made):
        raise ConfigError(f"{where}: {point.value} made a {type(made).__name__}; a factory must return a callable")
    return cast(Reward, made)


def _labels(named: Sequence[Named]) -> list[str]:
    """Names, with a number after those that come more than once."""
    total, seen = Counter(part.name for part in named), Counter[str]()
    labels: list[str] = []
    for part in named:
        seen[part.name] += 1
        labels.append(part.name if total[part.name] == 1 else f"{part.name}#{seen[part.name]}")
    return labels


def _unknown(name: str, names: list[str]) -> str:
    if not names:
        return (
            f"the reward {name!r} is unknown because no rewards are installed: they are found through the entry points "
            "of installed packages, and tdm-serve runs from a checkout; run: pip install -e '.[finetune]'"
        )
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"the reward {name!r} is unknown{hint}; known: {', '.join(names)}"
