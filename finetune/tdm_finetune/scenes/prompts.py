"""Prompts for scenes: several phrasings and synonyms, so that the text encoder has to read."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from tdm_finetune.scenes.world import CATEGORIES, DRAW, SPLITS, Category, Spec, Split, Thing, is_held_out

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "orange": ("orange",),
    "cyan": ("cyan", "turquoise"),
    "white": ("white",),
}
COUNT_WORDS = {1: ("one", "1", "a single"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
SIDE_WORDS = {"left of": "on its left", "right of": "on its right", "above": "above it", "below": "below it"}
FRAMES = (
    "{}",
    "{}",
    "a picture of {}",
    "an image of {}",
    "a photo of {}",
    "a drawing of {}",
    "{} on a dark background",
    "draw {}",
    "show me {}",
)
HELD_PHRASING_RESIDUE = 3  # one-object prompts have no combination to hold out; whole phrasings are held out instead


@dataclass(frozen=True, slots=True)
class ScenePrompt:
    """A prompt and the specification that the checker holds a picture to."""

    text: str
    spec: Spec


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("x", "s")) else "s")


def _noun(rng: random.Random, thing: Thing) -> str:
    noun = rng.choice(SHAPE_WORDS[thing.shape])
    return f"{rng.choice(COLOUR_WORDS[thing.colour])} {noun}" if thing.colour else noun


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _named(rng: random.Random, thing: Thing) -> str:
    return _with_article(_noun(rng, thing))


def _count_phrase(rng: random.Random, spec: Spec) -> str:
    noun = _noun(rng, spec.things[0])
    number = rng.choice(COUNT_WORDS[spec.count])
    if spec.count == 1:
        return f"{number} {noun}"
    return rng.choice(("{} {}", "exactly {} {}", "a group of {} {}")).format(number, _plural(noun))


def _position_phrase(rng: random.Random, spec: Spec) -> str:
    assert spec.relation is not None
    first, second = (_named(rng, thing) for thing in spec.things)
    if rng.random() < 0.25:
        return f"{second} with {first} {SIDE_WORDS[spec.relation]}"
    return f"{first} {rng.choice(RELATION_WORDS[spec.relation])} {second}"


def _text_phrase(rng: random.Random, spec: Spec) -> str:
    assert spec.word is not None and spec.colour is not None
    colour = rng.choice(COLOUR_WORDS[spec.colour])
    noun = "letter" if len(spec.word) == 1 else "letters"
    forms = (
        f'the {"letter" if len(spec.word) == 1 else "word"} "{spec.word}" in {colour}',
        f"{colour} {noun} {spec.word}",
        f"the {noun} {spec.word} in {colour}",
        f'the text "{spec.word}" written in {colour}',
    )
    return rng.choice(forms)


def phrase(spec: Spec, rng: random.Random) -> str:
    """A prompt for `spec`, drawn among its phrasings."""
    match spec.category:
        case "counting":
            body = _count_phrase(rng, spec)
        case "position":
            body = _position_phrase(rng, spec)
        case "text":
            body = _text_phrase(rng, spec)
        case "one_object" | "colours":
            body = _named(rng, spec.things[0])
        case "two_objects" | "attribution":
            body = " and ".join(_named(rng, thing) for thing in spec.things)
    return _typed(rng, rng.choice(FRAMES).format(body))


def _typed(rng: random.Random, text: str) -> str:
    """As people type: now and then a capital to start with, or a full stop at the end."""
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def _phrasing_is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 10 == HELD_PHRASING_RESIDUE


def _belongs(prompt: ScenePrompt, split: Split) -> bool:
    held = is_held_out(prompt.spec)
    if prompt.spec.category == "one_object":
        held = _phrasing_is_held_out(prompt.text)
    return held == (split == "heldout")


def prompts(split: Split, category: Category | None = None, seed: int = 0) -> Iterator[ScenePrompt]:
    """Endless deterministic stream of prompts of a split; categories in turn when none is named.

    `train` and `val` share combinations and differ in their random stream; every `heldout` prompt contains a
    combination (or, for one object, a phrasing) that training never sees.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"category {category!r} is unknown; choose one of {', '.join(CATEGORIES)}")
    rng = random.Random(f"{split}/{category or 'all'}/{seed}")
    wanted: tuple[Category, ...] = (category,) if category else CATEGORIES
    for name in cycle(wanted):
        yield _draw(rng, name, split)


def _draw(rng: random.Random, category: Category, split: Split) -> ScenePrompt:
    while True:
        spec = DRAW[category](rng)
        prompt = ScenePrompt(phrase(spec, rng), spec)
        if _belongs(prompt, split):
            return prompt
