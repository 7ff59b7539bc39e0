"""The exact checker: what a picture shows, and whether that is what its prompt asked for.

No detector is needed: objects are connected foreground components, a component's colour is its interior's, and its
name is the best match of its box-normalised mask among the templates. A component that matches no template well
counts as an unknown object, so blur, fragments and extra objects fail the strict score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tdm_finetune.scenes.render import Mask, Pixels, letter_mask, shape_mask
from tdm_finetune.scenes.world import BACKGROUND, COLOURS, LETTERS, SHAPES, SIZE, Spec, Thing

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background that makes a pixel part of an object
MIN_PIXELS = 24  # smaller components are dust, reported but not counted
COLOUR_DISTANCE = 60.0  # farther from every palette colour: no name
MIN_OVERLAP = 0.75  # intersection over union with the best template
TEMPLATE = 24  # side of the normalised masks
RELATION_MARGIN = 8  # pixels between centres before one thing is beside another
MAX_LETTER_ASPECT_ERROR = 0.22  # of width over height

NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Seen:
    """One object in a picture. `colour` or `name` is None where nothing matches well enough."""

    name: str | None
    colour: str | None
    x: float
    y: float
    pixels: int
    overlap: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """strict is 0 or 1; soft is in [0, 1] and is 1 exactly when strict is."""

    strict: int
    soft: float
    seen: tuple[Seen, ...]


@cache
def _templates(letters: bool) -> tuple[tuple[str, ...], NDArray[np.bool_], NDArray[np.float32]]:
    """Names, masks (N, TEMPLATE ** 2) and width over height (N,) of shapes or of letters."""
    names = tuple(LETTERS) if letters else SHAPES
    masks = [letter_mask(name) if letters else shape_mask(name, 40) for name in names]
    aspects = [_cropped(mask > 0.5) for mask in masks]
    return (
        names,
        np.stack([_normalised(mask) for mask in masks]),
        np.array([crop.shape[1] / crop.shape[0] for crop in aspects], dtype=np.float32),
    )


def _cropped(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _normalised(mask: Mask | NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's ink stretched to TEMPLATE x TEMPLATE, flat."""
    crop = _cropped(np.asarray(mask) > 0.5)
    image = Image.fromarray(crop.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    return (np.asarray(image) > 127).reshape(-1)


def _colour_name(pixels: NDArray[np.float32]) -> str | None:
    distances = np.linalg.norm(PALETTE - np.median(pixels, axis=0), axis=1)
    best = int(distances.argmin())
    return NAMES[best] if distances[best] <= COLOUR_DISTANCE else None


def _match(mask: NDArray[np.bool_], letters: bool) -> tuple[str | None, float]:
    """Best template and its intersection over union; no name below MIN_OVERLAP or for a far-off letter width."""
    names, templates, aspects = _templates(letters)
    flat = _normalised(mask)
    overlap = (templates & flat).sum(1) / np.maximum((templates | flat).sum(1), 1)
    aspect = mask.shape[1] / mask.shape[0]
    tolerance = MAX_LETTER_ASPECT_ERROR if letters else 0.3
    overlap = np.where(np.abs(aspects - aspect) <= tolerance, overlap, 0.0)
    best = int(overlap.argmax())
    value = float(overlap[best])
    return (names[best] if value >= MIN_OVERLAP else None), value


def look(image: Pixels, *, letters: bool = False) -> tuple[Seen, ...]:
    """The objects in a uint8 (128, 128, 3) picture, from left to right; names from shapes or from letters."""
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the picture has shape {image.shape}; the checker reads ({SIZE}, {SIZE}, 3)")
    pixels = image.astype(np.float32)
    foreground = np.linalg.norm(pixels - np.array(BACKGROUND, dtype=np.float32), axis=-1) > FOREGROUND_DISTANCE
    labels = np.zeros(foreground.shape, dtype=np.int32)
    ndimage.label(foreground, output=labels)  # 4-connected
    found = [
        _describe(pixels[box], labels[box] == index, box, letters)
        for index, box in enumerate(ndimage.find_objects(labels), start=1)
        if box is not None
    ]
    return tuple(sorted((seen for seen in found if seen.pixels >= MIN_PIXELS), key=lambda seen: seen.x))


def _describe(pixels: NDArray[np.float32], mask: NDArray[np.bool_], box: tuple[slice, slice], letters: bool) -> Seen:
    size = int(mask.sum())
    if size < MIN_PIXELS:
        return Seen(None, None, 0.0, 0.0, size, 0.0)
    interior = np.asarray(ndimage.binary_erosion(mask), dtype=np.bool_)
    name, overlap = _match(mask, letters)
    colour = _colour_name(pixels[interior if interior.any() else mask])
    height, width = mask.shape
    return Seen(name, colour, box[1].start + width / 2, box[0].start + height / 2, size, overlap)


def _fits(seen: Seen, thing: Thing) -> float:
    """Share of what is asked of one thing: its shape, and its colour where one is named."""
    shape = float(seen.name == thing.shape)
    if thing.colour is None:
        return shape if seen.colour is not None else 0.5 * shape
    return 0.5 * shape + 0.5 * float(seen.colour == thing.colour)


def _relation_holds(first: Seen, second: Seen, relation: str) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    if relation in ("right of", "below"):
        dx, dy = -dx, -dy
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return along >= RELATION_MARGIN and along >= abs(across)


def _count_score(seen: int, wanted: int) -> float:
    return max(0.0, 1.0 - abs(seen - wanted) / wanted)


def _check_things(seen: tuple[Seen, ...], spec: Spec) -> float:
    """Mean of the count score, the best assignment of things to objects, and the relation where there is one."""
    things = spec.things * spec.count
    count = _count_score(len(seen), len(things))
    best, holds = 0.0, 0.0
    # more than six objects are far from any prompt; the largest six decide the assignment
    largest = sorted(seen, key=lambda s: -s.pixels)[:6]
    slots = [*largest, *[None] * max(0, len(things) - len(largest))]
    for chosen in permutations(slots, len(things)):
        fit = sum(_fits(s, t) for s, t in zip(chosen, things, strict=True) if s is not None) / len(things)
        related = 0.0
        if spec.relation and chosen[0] is not None and chosen[1] is not None:
            related = float(_relation_holds(chosen[0], chosen[1], spec.relation))
        if (fit, related) > (best, holds):
            best, holds = fit, related
    return (count + best + holds * best) / 3 if spec.relation else (count + best) / 2


def _check_word(seen: tuple[Seen, ...], spec: Spec) -> float:
    """Mean of: 1 - edit distance / length, the colour of the letters, the letters' common line."""
    assert spec.word is not None
    read = "".join(s.name or "?" for s in seen)
    letters = max(0.0, 1.0 - edit_distance(read, spec.word) / len(spec.word))
    coloured = sum(s.colour == spec.colour for s in seen) / max(len(seen), len(spec.word))
    level = float(np.ptp([s.y for s in seen]) <= SIZE / 8) if seen else 0.0
    return 0.6 * letters + 0.3 * coloured + 0.1 * level


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def check(image: Pixels, spec: Spec) -> Verdict:
    """Holds a uint8 (128, 128, 3) picture to `spec`."""
    seen = look(image, letters=spec.word is not None)
    soft = _check_word(seen, spec) if spec.word is not None else _check_things(seen, spec)
    return Verdict(int(soft > 1.0 - 1e-9), soft, seen)
