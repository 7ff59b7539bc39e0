"""Scores pictures of any world, however they were made: one row for trainers, evaluations and experiments.

Beside the exact checker's strict and soft score stand numbers that no reward sees: the out-of-domain monitor's and the
second judge's. A row without one of them holds null, and under `missing` why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tdm_finetune import judge, monitor, scenes
from tdm_finetune.scenes import CATEGORIES, Verdict
from tdm_finetune.scenes.render import Pixels


class Grade(Protocol):
    """What a checker says of one picture."""

    @property
    def strict(self) -> float: ...

    @property
    def soft(self) -> float: ...


class SecondJudge(Protocol):
    """A judge that is no reward, such as `tdm_finetune.judge.Judge`."""

    def missing(self, specs: Sequence[Any]) -> str | None:
        """Why pictures of `specs` cannot be judged here, or None."""
        ...

    def verdicts(self, pictures: Sequence[Pixels], specs: Sequence[Any]) -> Sequence[int]:
        """0 or 1 per picture."""
        ...


class Asked(Protocol):
    """A prompt: `spec` is what the world's checker takes, and has a `category`."""

    @property
    def spec(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class World:
    """What scoring needs to know of the world that prompts are from."""

    check: Callable[[NDArray[np.uint8], Sequence[Any]], Sequence[Grade]]  # pictures (B, H, W, 3), specs (B)
    categories: tuple[str, ...]
    palette: monitor.Palette
    second_judge: Callable[[], SecondJudge] | None = None


def _check_scenes(pictures: NDArray[np.uint8], specs: Sequence[Any]) -> list[Verdict]:
    return [scenes.check(picture, spec) for picture, spec in zip(pictures, specs, strict=True)]


SCENES = World(_check_scenes, CATEGORIES, monitor.SCENES, judge.shipped)


class Score(NamedTuple):
    """Of one picture; `second` is None where no second judge has looked."""

    category: str
    strict: float
    soft: float
    second: int | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What `score_pictures` finds: picture by picture, and for all together."""

    each: tuple[Score, ...]
    grades: tuple[Any, ...]  # as the world's checker gave them
    palette_error: float
    compressibility: float
    diversity: float | None
    missing: dict[str, str]  # name of what is None -> why

    def of(self, category: str | None = None) -> dict[str, float | int]:
        """Mean strict and soft score and the number of pictures, of one category or of all."""
        chosen = self._chosen(category)
        return {
            "strict": round(mean(score.strict for score in chosen), 4),
            "soft": round(mean(score.soft for score in chosen), 4),
            "n": len(chosen),
        }

    def second(self, category: str | None = None) -> float | None:
        """Share that the second judge accepts."""
        said = [score.second for score in self._chosen(category) if score.second is not None]
        return round(mean(said), 4) if said else None

    def row(self, categories: Sequence[str]) -> dict[str, Any]:
        """JSON-ready; categories in the given order."""
        present = {score.category for score in self.each}
        names = [name for name in categories if name in present]
        judged = "second_judge" not in self.missing
        return {
            **self.of(),
            "categories": {name: self.of(name) for name in names},
            "palette_error": round(self.palette_error, 6),
            "compressibility": round(self.compressibility, 3),
            "diversity": None if self.diversity is None else round(self.diversity, 5),
            "second_judge": self.second(),
            "second_judge_categories": {name: self.second(name) for name in names} if judged else None,
            "missing": self.missing,
        }

    def _chosen(self, category: str | None) -> list[Score]:
        return [score for score in self.each if category in (None, score.category)]


def score_pictures(
    pictures: Sequence[Pixels] | NDArray[np.uint8],
    prompts: Sequence[Asked],
    *,
    world: World = SCENES,
    repeats: NDArray[np.uint8] | None = None,
    second_judge: bool = True,
) -> Scores:
    """Scores one picture (H, W, 3) per prompt; needs no model.

    `repeats` (prompts, seeds, H, W, 3) are pictures of some prompts from several seeds, for the diversity. What cannot
    be had is None, with the reason in `missing`. ValueError if there are not as many pictures as prompts.
    """
    if len(pictures) != len(prompts) or not len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts; give one picture for each")
    array, specs = np.stack(list(pictures)), [prompt.spec for prompt in prompts]
    grades = world.check(array, specs)
    missing: dict[str, str] = {}
    if repeats is None:
        missing["diversity"] = "no prompt was repeated"
    seconds, reason = _second_opinion(array, specs, world) if second_judge else (None, "skipped")
    if reason is not None:
        missing["second_judge"] = reason
    return Scores(
        tuple(
            Score(spec.category, float(grade.strict), float(grade.soft), second)
            for spec, grade, second in zip(specs, grades, seconds or [None] * len(specs), strict=True)
        ),
        tuple(grades),
        monitor.palette_error(array, world.palette),
        monitor.compressibility(array),
        None if repeats is None else monitor.diversity(repeats),
        missing,
    )


def _second_opinion(
    pictures: NDArray[np.uint8], specs: Sequence[Any], world: World
) -> tuple[Sequence[int] | None, str | None]:
    """The second judge's verdicts, or None and why there are none."""
    if world.second_judge is None:
        return None, "this world has no second judge"
    second = world.second_judge()
    if (reason := second.missing(specs)) is not None:
        return None, reason
    return second.verdicts(list(pictures), specs), None


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
