"""GenEval: does the picture hold the objects, counts, colours and places that its metadata asks for?

The formulas work over any detector (`tdm_finetune.rewards.detectors`). Metadata is a line of the published JSONL:
`include` clauses {class, count, color?, position?: [relation, clause]}, `exclude` clauses {class, count}, and `tag`.
A scene's specification is turned into such clauses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdm_finetune.rewards.base import BadSample, Metadata, Reward
from tdm_finetune.rewards.detectors import (
    ColourNamer,
    Detector,
    Found,
    clip_colours,
    mask2former,
    own_colours,
    scene_objects,
)

Score = Literal["dense", "strict", "official"]
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # least score of an object, above which it counts
MAX_OBJECTS = 16  # per class
SLACK = 0.1  # of two objects' sizes that an offset must exceed
Groups = Mapping[str, Sequence[Found]]
Name = Callable[[Sequence[Found]], Sequence[str | None]]  # a picture's objects of one class -> their colours


@dataclass(frozen=True, slots=True)
class Clause:
    """What must be in the picture. `target` is the earlier clause that `relation` is relative to."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """All of a prompt's clauses. `exclude`: a class and the count from which on there are too many."""

    include: tuple[Clause, ...]
    exclude: tuple[tuple[str, int], ...] = ()
    counting: bool = False


def geneval(
    score: Score = "dense",
    detector: Literal["mask2former", "scenes"] = "mask2former",
    model: str = "facebook/mask2former-swin-small-coco-instance",
    colours: str = "openai/clip-vit-large-patch14",
    device: str = "auto",
) -> Reward:
    """`dense` (the training reward), `strict` (all exact) or `official` (the benchmark's "correct"); see `dense`.

    `mask2former` finds COCO's 80 classes with `model` and names colours with the CLIP model `colours`, as GenEval
    (Ghosh et al. 2023) does; `scenes` is the scene checker's eye, which needs no weights.
    """
    if detector == "scenes":
        return reward_from(scene_objects, own_colours, score)
    return reward_from(mask2former(model, device), clip_colours(colours, device), score)


def reward_from(detector: Detector, colours: ColourNamer, score: Score = "dense") -> Reward:
    """The reward over any detector and any way to name colours."""
    formula = {"dense": dense, "strict": strict, "official": official}[score]

    def reward(images: Tensor, _prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        wanted = [wanted_of(index, data) for index, data in enumerate(metadata)]
        scores: list[float] = []
        for picture, clauses in zip(images.numpy(), wanted, strict=True):
            groups = grouped(detector(picture), COUNTING_THRESHOLD if clauses.counting else THRESHOLD)
            scores.append(float(formula(groups, clauses, _namer(colours, picture))))
        return torch.tensor(scores)

    return reward


def dense(groups: Groups, wanted: Wanted, name: Name) -> float:
    """The mean of the clauses' scores, as the released reward server of Flow-GRPO computes it for training.

    A clause with n objects of N gives 1 - |N - n| / N, below 0 for n > 2 N. If n differs from N, it gives another 0
    where it asks for a colour or a place. Otherwise it gives 1 - |N - m| / N for m objects of the colour, and, unless
    the colour was wrong, for the place: 0 if its target was not matched, 1 if the relation holds, and **both 0 and 1 if
    it is violated**. That last one is a quirk of the released code (a violated relation costs half), kept because
    published results were trained with it. `exclude` plays no part.
    """
    values: list[float] = []
    matched: list[Sequence[Found] | None] = []
    for clause in wanted.include:
        objects = groups.get(clause.name, ())
        values.append(1 - abs(clause.count - len(objects)) / clause.count)
        fits = len(objects) == clause.count
        if not fits and (clause.colour or clause.relation):
            values.append(0.0)
        if fits and clause.colour:
            coloured = list(name(objects)).count(clause.colour)
            values.append(1 - abs(clause.count - coloured) / clause.count)
            fits = coloured == clause.count
        if fits and clause.relation:
            target = matched[clause.target]
            fits = target is not None and _all_related(objects, target, clause.relation)
            values += [] if fits else [0.0]
            values += [] if target is None else [1.0]
        matched.append(objects if fits else None)
    return sum(values) / len(values) if values else 0.0


def strict(groups: Groups, wanted: Wanted, name: Name) -> bool:
    """True if every clause holds exactly: no object too few or too many, all of the colour, all in place."""
    return _all_clauses(groups, wanted, name, lambda objects, count: objects if len(objects) == count else None)


def official(groups: Groups, wanted: Wanted, name: Name) -> bool:
    """The benchmark's "correct": at least N objects, judged by the N surest, and none that is excluded."""
    if any(len(groups.get(excluded, ())) >= count for excluded, count in wanted.exclude):
        return False
    return _all_clauses(groups, wanted, name, lambda objects, count: objects[:count] if len(objects) >= count else None)


def grouped(found: Iterable[Found], threshold: float) -> dict[str, list[Found]]:
    """Objects above the threshold by class, the surest first, at most MAX_OBJECTS of each."""
    groups: dict[str, list[Found]] = {}
    for item in sorted(found, key=lambda item: -item.score):
        group = groups.setdefault(item.name, [])
        if item.score > threshold and len(group) < MAX_OBJECTS:
            group.append(item)
    return groups


def relations(a: Found, b: Found) -> set[str]:
    """Where a is relative to b: the centres' offset less a tenth of both sizes, more than half of it along an axis."""
    first, second = (np.array(item.box).reshape(2, 2) for item in (a, b))
    offset: NDArray[np.float64] = first.mean(0) - second.mean(0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    revised = np.maximum(np.abs(offset) - SLACK * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    x, y = revised / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def wanted_of(index: int, metadata: Metadata) -> Wanted:
    """A sample's clauses from GenEval's metadata or from a scene; BadSample where there are none."""
    try:
        if "include" in metadata:
            return _from_jsonl(metadata)
        if "spec" in metadata:
            return _from_scene(index, metadata)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadSample(index, f"its metadata is not as GenEval's: {type(error).__name__}: {error}") from error
    raise BadSample(index, f"its metadata has neither 'include' nor 'spec', only {sorted(metadata) or 'nothing'}")


def _all_clauses(
    groups: Groups, wanted: Wanted, name: Name, choose: Callable[[Sequence[Found], int], Sequence[Found] | None]
) -> bool:
    matched: list[Sequence[Found]] = []
    for clause in wanted.include:
        objects = choose(groups.get(clause.name, ()), clause.count)
        if objects is None:
            return False
        if clause.colour and list(name(objects)).count(clause.colour) < clause.count:
            return False
        if clause.relation and not _all_related(objects, matched[clause.target], clause.relation):
            return False
        matched.append(objects)
    return True


def _all_related(objects: Sequence[Found], targets: Sequence[Found], relation: str) -> bool:
    return all(relation in relations(a, b) for a in objects for b in targets)


def _namer(colours: ColourNamer, picture: NDArray[np.uint8]) -> Name:
    return lambda objects: colours(picture, objects)


def _from_jsonl(metadata: Metadata) -> Wanted:
    include = tuple(_clause(place, clause) for place, clause in enumerate(metadata["include"]))
    if not include:
        raise ValueError("'include' is empty")
    exclude = tuple((str(e["class"]), int(e["count"])) for e in metadata.get("exclude") or ())
    return Wanted(include, exclude, metadata.get("tag") == "counting")


def _clause(place: int, data: Mapping[str, Any]) -> Clause:
    count, position = int(data["count"]), cast("Sequence[Any] | None", data.get("position"))
    if count < 1:
        raise ValueError(f"clause {place} has count {count}; it must be at least 1")
    if position is None:
        return Clause(data["class"], count, data.get("color"))
    relation, target = position
    if relation not in RELATIONS or not 0 <= target < place:
        raise ValueError(
            f"clause {place} has position {position!r}; it must be one of {RELATIONS} and an earlier clause"
        )
    return Clause(data["class"], count, data.get("color"), relation, target)


def _from_scene(index: int, metadata: Metadata) -> Wanted:
    """things[0] is `relation` things[1], so the clause of things[1] comes first."""
    from tdm_finetune.rewards.scenes import spec_of

    spec = spec_of(index, metadata)
    if spec.word is not None:
        raise BadSample(index, f"its scene asks for the word {spec.word!r}; GenEval has no clause for words")
    clauses = [Clause(thing.shape, spec.count, thing.colour) for thing in reversed(spec.things)]
    if spec.relation:
        last = clauses[-1]
        clauses[-1] = Clause(last.name, last.count, last.colour, spec.relation, 0)
    counting = spec.category == "counting"
    exclude = ((clauses[0].name, spec.count + 1),) if counting else ()
    return Wanted(tuple(clauses), exclude, counting)
