"""How often a judge is right: on true renders, on true ones a little softened, and on renders of something else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from scipy import ndimage

from tdm_finetune.judge import reading
from tdm_finetune.judge.verdict import Judge
from tdm_finetune.scenes.prompts import prompts
from tdm_finetune.scenes.render import Pixels, render
from tdm_finetune.scenes.world import CATEGORIES, COLOURS, LETTERS, MAX_COUNT, OPPOSITE, SHAPES, Spec

TRUE, SOFTENED = "true", "softened"
WAYS = ("colour", "count", "side", "shape", "letter")


@dataclass(frozen=True, slots=True)
class Case:
    """A picture, what it is held to, and what it is: true, softened, or wrong in one of WAYS."""

    picture: Pixels
    spec: Spec
    nature: str


def cases(per_category: int, seed: int) -> Iterator[Case]:
    """Held-out prompts, each with a true picture, a softened one, and one for every way in which it can be wrong."""
    rng = random.Random(f"judge/{seed}")
    for category in CATEGORIES:
        for prompt in islice(prompts("heldout", category, seed), per_category):
            picture = render(prompt.spec, rng, allow_held_out=True)
            yield Case(picture, prompt.spec, TRUE)
            yield Case(softened(picture, rng), prompt.spec, SOFTENED)
            for way, spec in wrong(prompt.spec, rng).items():
                yield Case(render(spec, rng, allow_held_out=True), prompt.spec, way)


def softened(picture: Pixels, rng: random.Random) -> Pixels:
    """About what an autoencoder does to a picture: a blur of 0.8 pixels and grain of 6 levels."""
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, picture.shape)
    return (ndimage.gaussian_filter(picture.astype(np.float32), (0.8, 0.8, 0)) + grain).clip(0, 255).astype(np.uint8)


def wrong(spec: Spec, rng: random.Random) -> dict[str, Spec]:
    """Way -> a scene that differs from `spec` in it, where that is possible."""
    if spec.word is not None:
        colour = rng.choice([c for c in COLOURS if c != spec.colour])
        return {"colour": replace(spec, colour=colour), "letter": replace(spec, word=_misspelt(spec.word, rng))}
    first, *rest = spec.things
    shape = rng.choice([s for s in SHAPES if s not in {thing.shape for thing in spec.things}])
    ways = {
        "shape": replace(spec, things=(replace(first, shape=shape), *rest)),
        "count": _miscounted(spec, rng),
    }
    if first.colour is not None:
        colour = rng.choice([c for c in COLOURS if c != first.colour])
        ways["colour"] = replace(spec, things=(replace(first, colour=colour), *rest))
    if spec.relation is not None:
        across = ("above", "below") if spec.relation in ("left of", "right of") else ("left of", "right of")
        ways["side"] = replace(spec, relation=rng.choice((OPPOSITE[spec.relation], *across)))
    return ways


def _miscounted(spec: Spec, rng: random.Random) -> Spec:
    if spec.category == "counting":
        return replace(spec, count=rng.choice([n for n in range(1, MAX_COUNT + 1) if n != spec.count]))
    fewer = len(spec.things) > 1 and rng.random() < 0.5
    things = spec.things[1:] if fewer else (*spec.things, rng.choice(spec.things))
    return replace(spec, things=things, relation=None)


def _misspelt(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word))
    letter = rng.choice([x for x in LETTERS if x != word[place]])
    return word[:place] + letter + word[place + 1 :]


def measure(judge: Judge, per_category: int, seed: int) -> dict[str, Any]:
    """Shares of pictures that are accepted (true, softened; by category) and rejected (wrong; by way), JSON-ready.

    Words are left out where Tesseract is not installed, and the result says so.
    """
    chosen = [case for case in cases(per_category, seed) if judge.missing([case.spec]) is None]
    accepted = judge.verdicts([case.picture for case in chosen], [case.spec for case in chosen])
    judged = list(zip(chosen, accepted, strict=True))

    def share(nature: Sequence[str], category: str | None = None) -> float:
        values = [said for case, said in judged if case.nature in nature and category in (None, case.spec.category)]
        return round(float(np.mean(values)), 4)

    present = [name for name in CATEGORIES if any(case.spec.category == name for case in chosen)]
    ways = [way for way in WAYS if any(case.nature == way for case in chosen)]
    return {
        "accept_true": {name: share((TRUE,), name) for name in present} | {"all": share((TRUE,))},
        "accept_softened": {name: share((SOFTENED,), name) for name in present} | {"all": share((SOFTENED,))},
        "reject_wrong": {way: round(1 - share((way,)), 4) for way in ways} | {"all": round(1 - share(ways), 4)},
        "prompts_per_category": per_category,
        "split": "heldout",
        "seed": seed,
        "tesseract": reading.version(),
    }
