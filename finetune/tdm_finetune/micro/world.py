"""What the micro world can ask for, in words and in true pictures: coloured squares on a three by three lattice.

The grammar is fixed, so the words are the tokens. Colours are the large world's, and so are the categories, in small:
how many squares, which two colours, and which of two lies where.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tdm_finetune.scenes import world as scene_world
from tdm_finetune.scenes.world import BACKGROUND, OPPOSITE, RELATIONS, SPLITS, Split

SIZE = 16  # pixels a side
SQUARE = 4  # pixels a side of every object
CELLS = 3  # of the lattice, a side; neighbours leave one pixel of background between them
PITCH = 5  # pixels from cell to cell
OFFSET = 1  # pixels before the first cell
MAX_COUNT = 4
COLOURS = {name: scene_world.COLOURS[name] for name in ("red", "green", "blue", "yellow", "purple", "white")}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}

# whole combinations that no training prompt asks for
HELD_COUNTS = frozenset({(1, "purple"), (2, "green"), (3, "blue"), (4, "yellow")})
HELD_PAIRS = frozenset({("green", "purple"), ("red", "white")})  # in alphabetical order
HELD_RELATIONS = frozenset(
    {
        ("red", "left of", "blue"),
        ("green", "above", "red"),
        ("blue", "left of", "yellow"),
        ("yellow", "above", "white"),
        ("white", "left of", "purple"),
        ("purple", "above", "green"),
    }
)

Category = Literal["counting", "pair", "position"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
Pixels = NDArray[np.uint8]
Cell = tuple[int, int]  # row, column


@dataclass(frozen=True, slots=True)
class Spec:
    """What a prompt asks for: a colour and a count, two colours, or two of which the first is `relation` the second."""

    category: Category
    colours: tuple[str, ...]
    count: int = 1
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category {self.category!r} is unknown; choose one of {', '.join(CATEGORIES)}")
        if not set(self.colours) <= COLOURS.keys() or len(set(self.colours)) != (
            1 if self.category == "counting" else 2
        ):
            raise ValueError(f"colours {self.colours} do not suit {self.category}; choose among {', '.join(COLOURS)}")
        if not 1 <= self.count <= (MAX_COUNT if self.category == "counting" else 1):
            raise ValueError(f"count is {self.count}; it must be between 1 and {MAX_COUNT}, and 1 but for counting")
        if self.relation not in (RELATIONS if self.category == "position" else (None,)):
            raise ValueError(
                f"relation {self.relation!r} does not suit {self.category}; a position has one of {RELATIONS}"
            )

    @property
    def squares(self) -> tuple[str, ...]:
        """The colour of every square of a right picture."""
        return self.colours * self.count


@dataclass(frozen=True, slots=True)
class MicroPrompt:
    """A prompt and the specification that the checker holds a picture to."""

    text: str
    spec: Spec


def phrase(spec: Spec) -> str:
    """The one way to say it."""
    if spec.category == "counting":
        return f"{COUNTS[spec.count]} {spec.colours[0]} {'square' if spec.count == 1 else 'squares'}"
    first, second = spec.colours
    if spec.relation is None:
        return f"a {first} and a {second} square"
    return f"a {first} square {spec.relation} a {second} square"


def is_held_out(spec: Spec) -> bool:
    """True if `spec` is kept out of training; "A left of B" and "B right of A" go together."""
    match spec.category:
        case "counting":
            return (spec.count, spec.colours[0]) in HELD_COUNTS
        case "pair":
            return tuple(sorted(spec.colours)) in HELD_PAIRS
        case "position":
            assert spec.relation is not None
            first, second, relation = *spec.colours, spec.relation
            if relation in ("right of", "below"):
                first, second, relation = second, first, OPPOSITE[relation]
            return (first, relation, second) in HELD_RELATIONS


def _counting(rng: random.Random) -> Spec:
    return Spec("counting", (rng.choice(tuple(COLOURS)),), count=rng.randint(1, MAX_COUNT))


def _pair(rng: random.Random) -> Spec:
    return Spec("pair", tuple(rng.sample(tuple(COLOURS), 2)))


def _position(rng: random.Random) -> Spec:
    return Spec("position", tuple(rng.sample(tuple(COLOURS), 2)), relation=rng.choice(RELATIONS))


DRAW: dict[Category, Callable[[random.Random], Spec]] = {"counting": _counting, "pair": _pair, "position": _position}


def draw(category: Category, split: Split, rng: random.Random) -> Spec:
    """A specification of a category and a split."""
    while True:
        spec = DRAW[category](rng)
        if is_held_out(spec) == (split == "heldout"):
            return spec


def prompts(split: Split, category: Category | None = None, seed: int = 0) -> Iterator[MicroPrompt]:
    """Endless deterministic stream of prompts of a split; categories in turn when none is named.

    `train` and `val` share combinations and differ in their random stream; no `heldout` combination is in training.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"category {category!r} is unknown; choose one of {', '.join(CATEGORIES)}")
    rng = random.Random(f"micro/{split}/{category or 'all'}/{seed}")
    for name in cycle((category,) if category else CATEGORIES):
        spec = draw(name, split, rng)
        yield MicroPrompt(phrase(spec), spec)


def relation_holds(relation: str, right: float, down: float, margin: float) -> bool:
    """Whether the first of two things is `relation` the second, which lies `right` and `down` of it.

    The distance along the relation's axis must reach `margin` and exceed the distance across, so that at most one
    relation holds.
    """
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("right of", "below"):
        along = -along
    return along >= margin and along > abs(across)


LATTICE: tuple[Cell, ...] = tuple((row, column) for row in range(CELLS) for column in range(CELLS))
PLACES: dict[str, tuple[tuple[Cell, Cell], ...]] = {
    relation: tuple((a, b) for a in LATTICE for b in LATTICE if relation_holds(relation, b[1] - a[1], b[0] - a[0], 1.0))
    for relation in RELATIONS
}


def render(specs: Sequence[Spec], rng: random.Random) -> Pixels:
    """True pictures as uint8 (B, 16, 16, 3), the squares on cells drawn by `rng`."""
    pictures = np.empty((len(specs), SIZE, SIZE, 3), dtype=np.uint8)
    pictures[:] = BACKGROUND
    for picture, spec in zip(pictures, specs, strict=True):
        squares = spec.squares
        cells = rng.choice(PLACES[spec.relation]) if spec.relation else rng.sample(LATTICE, len(squares))
        for (row, column), colour in zip(cells, squares, strict=True):
            top, left = OFFSET + PITCH * row, OFFSET + PITCH * column
            picture[top : top + SQUARE, left : left + SQUARE] = COLOURS[colour]
    return pictures
