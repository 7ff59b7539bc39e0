"""The exact checker, for whole batches at once: what pictures show, and whether it is what their prompts asked for.

Objects are connected foreground components; a component's colour is its mean's nearest name; it is a square if a
4 x 4 box on its centre overlaps it well. Anything else counts as an unknown object, so blur, fragments and extra
objects fail the strict score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tdm_finetune.micro.world import BACKGROUND, COLOURS, SIZE, SQUARE, Pixels, Spec, relation_holds

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background that makes a pixel part of an object
COLOUR_DISTANCE = 60.0  # farther from every palette colour: no name
MIN_PIXELS = 4  # smaller components are dust and not counted
MIN_OVERLAP = 0.8  # intersection over union with a true square: a whole row less is none
RELATION_MARGIN = 3.0  # pixels between centres before one square is beside another

NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
IN_PLANE = np.zeros((3, 3, 3), dtype=np.int32)  # 4-connected within a picture, never across the batch
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Objects:
    """What a batch shows, one entry per object (N,)."""

    picture: Ints  # index into the batch
    colour: Ints  # index into NAMES; -1 for none
    square: NDArray[np.bool_]
    x: Floats  # centre, pixels
    y: Floats


class Verdict(NamedTuple):
    """Of one picture."""

    strict: float
    soft: float


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of a batch (B,): strict is 0 or 1; soft is in [0, 1] and is 1 exactly where strict is."""

    strict: Floats
    soft: Floats

    def each(self) -> list[Verdict]:
        """Picture by picture."""
        return [Verdict(float(strict), float(soft)) for strict, soft in zip(self.strict, self.soft, strict=True)]


def look(pictures: Pixels) -> Objects:
    """The objects in uint8 pictures (B, 16, 16, 3)."""
    if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the pictures have shape {pictures.shape}; the checker reads (B, {SIZE}, {SIZE}, 3)")
    pixels = pictures.astype(np.float64)
    distance = np.square(pixels - BACKGROUND).sum(-1)
    labels = np.zeros(distance.shape, dtype=np.int32)
    ndimage.label(distance > FOREGROUND_DISTANCE**2, structure=IN_PLANE, output=labels)
    where = np.nonzero(labels)
    return _describe(labels[where] - 1, where, pixels[where])


def _describe(label: NDArray[np.int32], where: tuple[Ints, ...], colours: Floats) -> Objects:
    """Objects from the foreground's labels (M,), places (M,) and colours (M, 3)."""
    picture, y, x = where
    area = np.bincount(label)
    centre_y, centre_x = np.bincount(label, y) / area, np.bincount(label, x) / area
    half = SQUARE / 2
    within = (np.abs(y - centre_y[label]) < half) & (np.abs(x - centre_x[label]) < half)
    inside = np.bincount(label, within)
    overlap = inside / (area + SQUARE**2 - inside)
    mean = np.stack([np.bincount(label, channel) for channel in colours.T], axis=1) / area[:, None]
    away = np.linalg.norm(mean[:, None] - PALETTE, axis=-1)  # (N, 6)
    colour = np.where(away.min(1, initial=np.inf) <= COLOUR_DISTANCE, away.argmin(1), -1)
    of_picture = np.zeros(len(area), dtype=np.intp)
    of_picture[label] = picture
    keep = area >= MIN_PIXELS
    return Objects(of_picture[keep], colour[keep], overlap[keep] >= MIN_OVERLAP, centre_x[keep], centre_y[keep])


def check(pictures: Pixels, specs: Sequence[Spec]) -> Verdicts:
    """Holds every picture to its specification.

    soft is the mean of: 1 - |objects - asked| / asked; the share of asked squares found, shape and colour half each;
    and for a relation, whether it holds, times that share.
    """
    if len(pictures) != len(specs):
        raise ValueError(f"there are {len(pictures)} pictures and {len(specs)} specifications; they go in pairs")
    seen = look(pictures)
    wanted = np.zeros((len(specs), len(NAMES)))
    for row, spec in zip(wanted, specs, strict=True):
        for colour in spec.squares:
            row[NAMES.index(colour)] += 1
    asked = wanted.sum(1)
    objects = np.bincount(seen.picture, minlength=len(specs))
    squares = np.bincount(seen.picture, seen.square, minlength=len(specs))
    count = np.maximum(0.0, 1.0 - np.abs(objects - asked) / asked)
    fit = (
        0.5 * np.minimum(squares, asked) / asked + 0.5 * np.minimum(_by_colour(seen, len(specs)), wanted).sum(1) / asked
    )
    related = _related(seen, specs)
    soft = np.where(np.isnan(related), (count + fit) / 2, (count + fit + fit * np.nan_to_num(related)) / 3)
    return Verdicts((soft > 1.0 - 1e-9).astype(np.float64), soft)


def _by_colour(seen: Objects, batch: int) -> Floats:
    """How many objects of each colour every picture shows, (B, 6)."""
    named = seen.colour >= 0
    key = seen.picture[named] * len(NAMES) + seen.colour[named]
    return np.bincount(key, minlength=batch * len(NAMES)).reshape(batch, len(NAMES)).astype(np.float64)


def _related(seen: Objects, specs: Sequence[Spec]) -> Floats:
    """1 where the asked relation holds, 0 where it does not, NaN where none is asked."""
    x, y = _centres(seen, seen.x, len(specs)), _centres(seen, seen.y, len(specs))
    holds = np.full(len(specs), np.nan)
    for index, spec in enumerate(specs):
        if spec.relation is not None:
            first, second = (NAMES.index(colour) for colour in spec.colours)
            right, down = x[index, second] - x[index, first], y[index, second] - y[index, first]
            holds[index] = relation_holds(spec.relation, right, down, RELATION_MARGIN)
    return holds


def _centres(seen: Objects, along: Floats, batch: int) -> Floats:
    """Mean place (B, 6) of a picture's objects of each colour; NaN, with which no relation holds, if there is none."""
    named = seen.colour >= 0
    key = seen.picture[named] * len(NAMES) + seen.colour[named]
    total = np.bincount(key, along[named], minlength=batch * len(NAMES)).reshape(batch, len(NAMES))
    n = _by_colour(seen, batch)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)
