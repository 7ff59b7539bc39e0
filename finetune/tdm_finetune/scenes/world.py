"""What a scene can ask for: colours, shapes, relations, words, and which combinations training never sees."""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

SIZE = 128  # pixels a side
BACKGROUND = (28, 30, 38)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 44),
    "green": (52, 168, 76),
    "blue": (52, 92, 228),
    "yellow": (240, 210, 52),
    "purple": (156, 64, 204),
    "orange": (244, 136, 28),
    "cyan": (64, 204, 220),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
LETTERS = string.ascii_uppercase
MAX_COUNT = 4
MAX_WORD = 3

# small families are held out by name, so that every value keeps most of its combinations; large ones by hash
HELD_PAIRS = frozenset(
    {
        ("circle", "yellow"),
        ("triangle", "white"),
        ("cross", "green"),
        ("ring", "cyan"),
        ("star", "purple"),
        ("square", "orange"),
    }
)
HELD_TOGETHER = frozenset({("star", "triangle"), ("circle", "cross")})
HELD_COUNTS = frozenset({(2, "ring"), (3, "square"), (4, "triangle")})

Category = Literal["one_object", "two_objects", "counting", "colours", "position", "attribution", "text"]
Split = Literal["train", "val", "heldout"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape that the prompt names. `colour` is None where the prompt leaves it open."""

    shape: str
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """What a prompt asks for; the checker needs nothing else.

    `things` holds one entry per named object; `count` repeats a single entry; `relation` reads "things[0] is
    `relation` things[1]"; `word` and `colour` describe a text scene, which has no things.
    """

    category: Category
    things: tuple[Thing, ...] = ()
    count: int = 1
    relation: str | None = None
    word: str | None = None
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category {self.category!r} is unknown; choose one of {', '.join(CATEGORIES)}")
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"count is {self.count}; it must be between 1 and {MAX_COUNT}")

    @property
    def objects(self) -> int:
        """How many connected objects a correct picture shows."""
        return len(self.word) if self.word else len(self.things) * self.count


def _held(*key: object) -> bool:
    """One combination in ten, chosen by a hash so that the split never depends on the order of anything."""
    return zlib.crc32("|".join(map(str, key)).encode()) % 10 == 8


def pair_is_held_out(shape: str, colour: str | None) -> bool:
    """Coloured shapes that no training picture shows, asked for or not."""
    return (shape, colour) in HELD_PAIRS


def is_held_out(spec: Spec) -> bool:
    """True if any combination in `spec` is kept out of training."""
    if any(pair_is_held_out(thing.shape, thing.colour) for thing in spec.things):
        return True
    shapes = [thing.shape for thing in spec.things]
    match spec.category:
        case "counting":
            return (spec.count, shapes[0]) in HELD_COUNTS
        case "two_objects":
            return tuple(sorted(shapes)) in HELD_TOGETHER
        case "position":
            return _held("position", *_canonical_relation(shapes, spec.relation))
        case "attribution":
            return _held("attribution", *sorted(f"{thing.colour} {thing.shape}" for thing in spec.things))
        case "text":
            assert spec.word is not None
            return _held("word", spec.word) if len(spec.word) > 1 else _held("letter", spec.word, spec.colour)
        case _:
            return False


def _canonical_relation(shapes: list[str], relation: str | None) -> tuple[str, ...]:
    """One name for "A left of B" and "B right of A"."""
    assert relation is not None
    if relation in ("right of", "below"):
        return (shapes[1], OPPOSITE[relation], shapes[0])
    return (shapes[0], relation, shapes[1])


def _distinct(rng: random.Random, values: tuple[str, ...], k: int) -> list[str]:
    return rng.sample(values, k)


def _one_object(rng: random.Random) -> Spec:
    return Spec("one_object", (Thing(rng.choice(SHAPES)),))


def _two_objects(rng: random.Random) -> Spec:
    return Spec("two_objects", tuple(Thing(shape) for shape in _distinct(rng, SHAPES, 2)))


def _counting(rng: random.Random) -> Spec:
    """A third of the prompts also name the colour."""
    colour = rng.choice(tuple(COLOURS)) if rng.random() < 1 / 3 else None
    return Spec("counting", (Thing(rng.choice(SHAPES), colour),), count=rng.randint(1, MAX_COUNT))


def _colours(rng: random.Random) -> Spec:
    return Spec("colours", (Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS))),))


def _coloured_pair(rng: random.Random) -> tuple[Thing, ...]:
    colours = _distinct(rng, tuple(COLOURS), 2)
    return tuple(Thing(s, c) for s, c in zip(_distinct(rng, SHAPES, 2), colours, strict=True))


def _position(rng: random.Random) -> Spec:
    """Half of the prompts also name both colours."""
    things = _coloured_pair(rng)
    if rng.random() < 0.5:
        things = tuple(Thing(thing.shape) for thing in things)
    return Spec("position", things, relation=rng.choice(RELATIONS))


def _attribution(rng: random.Random) -> Spec:
    return Spec("attribution", _coloured_pair(rng))


def _text(rng: random.Random) -> Spec:
    word = "".join(rng.choices(LETTERS, k=rng.randint(1, MAX_WORD)))
    return Spec("text", word=word, colour=rng.choice(tuple(COLOURS)))


DRAW: dict[Category, Callable[[random.Random], Spec]] = {
    "one_object": _one_object,
    "two_objects": _two_objects,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "attribution": _attribution,
    "text": _text,
}
