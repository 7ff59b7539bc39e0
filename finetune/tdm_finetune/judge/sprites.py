"""Objects for the judge's training pictures: whole ones, and ones that are damaged on purpose.

A judge of generated pictures must know what a botched object looks like, so shapes are bitten, bent, stretched,
blended into each other or painted in two colours, and blobs that are nothing at all lie about. Each carries what it is
called afterwards: its own name where the damage is slight, "other" (or "mixed", of colours) where it is heavy, and
UNSURE in between, which trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tdm_finetune.scenes.render import Mask, letter_mask, shape_mask
from tdm_finetune.scenes.world import COLOURS, LETTERS, SHAPES

KINDS = (*SHAPES, "letter", "other")
PAINTS = (*COLOURS, "mixed")
LETTER, OTHER, MIXED = KINDS.index("letter"), KINDS.index("other"), PAINTS.index("mixed")
UNSURE = -100  # torch's ignore_index
JITTER = 14  # of a palette colour, per channel
STRANGE = 62  # RGB distance from every palette colour that makes a colour nobody's

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Sprite:
    """One object: where its ink is, what it is called, and its colour."""

    mask: Mask  # (h, w) in [0, 1]
    kind: int  # index into KINDS, or UNSURE
    colour: int  # index into PAINTS, or UNSURE
    paint: NDArray[np.float32]  # (3,) or (h, w, 3)


def draw_shape(rng: np.random.Generator, shape: int, size: int, colour: int) -> Sprite:
    return Sprite(shape_mask(SHAPES[shape], size), shape, colour, shade(rng, colour))


def draw_letter(rng: np.random.Generator, colour: int) -> Sprite:
    """A random capital at 0.85 to 1.1 times the world's size."""
    mask = letter_mask(LETTERS[rng.integers(len(LETTERS))])
    return Sprite(_resized(mask, *rng.uniform(0.85, 1.1, 2)), LETTER, colour, shade(rng, colour))


def draw_blob(rng: np.random.Generator, colour: int) -> Sprite:
    """Dust, a stroke or a lump: an object that no prompt asks for."""
    if rng.random() < 0.6:
        height, width = rng.integers(5, 15, 2)
    else:
        height, width = rng.permutation([rng.integers(3, 9), rng.integers(16, 40)])
    y, x = np.mgrid[-1 : 1 : complex(0, height), -1 : 1 : complex(0, width)]
    lump = np.hypot(x, y) < 1.0 + 0.3 * np.sin(rng.integers(1, 5) * np.arctan2(y, x) + rng.uniform(0, 6))
    return Sprite(np.asarray(lump, dtype=np.float32), OTHER, colour, shade(rng, colour))


def shade(rng: np.random.Generator, colour: int) -> NDArray[np.float32]:
    """A palette colour, a little off."""
    return (_PALETTE[colour] + rng.uniform(-JITTER, JITTER, 3)).clip(0, 255).astype(np.float32)


def damaged(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """One random defect, slight or heavy."""
    return DEFECTS[rng.integers(len(DEFECTS))](rng, sprite)


def bite(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """Loses what lies beyond a line, or a round hole."""
    height, width = sprite.mask.shape
    y, x = np.mgrid[:height, :width]
    if rng.random() < 0.5:
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.95) * max(height, width) / 2
        keep = (x - width / 2) * np.cos(angle) + (y - height / 2) * np.sin(angle) < reach
    else:
        centre, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.1, 0.4) * max(height, width)
        keep = np.hypot(x - centre[0] * width, y - centre[1] * height) > radius
    mask = sprite.mask * keep
    kept = float(mask.sum() / sprite.mask.sum())
    if kept < 0.25:
        return sprite
    return replace(_cropped(sprite, mask), kind=_renamed(sprite, kept, slight=0.93, heavy=0.8))


def stretch(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """Gets wider or higher."""
    factor = rng.uniform(1.05, 1.7)
    tall = rng.random() < 0.5
    mask = _resized(sprite.mask, *((1.0, factor) if tall else (factor, 1.0)))
    return _whole(sprite, mask, _renamed(sprite, -factor, slight=-1.15, heavy=-1.3))


def bend(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """Its rows or columns slide along a wave."""
    mask = sprite.mask if rng.random() < 0.5 else np.ascontiguousarray(sprite.mask.T)
    amount = rng.uniform(0.02, 0.22)
    reach = max(1, round(amount * max(mask.shape)))
    margin = np.zeros((len(mask), reach), dtype=np.float32)
    wide = np.hstack([margin, mask, margin])
    wave = np.sin(np.arange(len(mask)) / len(mask) * rng.uniform(4, 14) + rng.uniform(0, 6))
    columns = np.arange(wide.shape[1])[None] - np.rint(reach * wave).astype(np.int64)[:, None]
    bent = np.take_along_axis(wide, columns.clip(0, wide.shape[1] - 1), axis=1)
    bent = bent if mask is sprite.mask else np.ascontiguousarray(bent.T)
    return _whole(sprite, bent, _renamed(sprite, -amount, slight=-0.05, heavy=-0.12))


def blend(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """Half its own shape, half another that looks different."""
    side = max(sprite.mask.shape)
    other = shape_mask(SHAPES[rng.integers(len(SHAPES))], side)
    if sprite.mask.shape != other.shape or np.minimum(sprite.mask, other).sum() > 0.7 * sprite.mask.sum():
        return sprite
    soft = ndimage.gaussian_filter(sprite.mask + other, 0.09 * side)
    return _whole(sprite, ((soft - 0.85) * 4).clip(0, 1).astype(np.float32), OTHER)


def two_tone(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """Part of it takes another colour: one side, or patches; with a soft border."""
    height, width = sprite.mask.shape
    if rng.random() < 0.5:
        y, x = np.mgrid[:height, :width]
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5) * max(height, width)
        depth = (x - width / 2) * np.cos(angle) + (y - height / 2) * np.sin(angle) - reach
    else:
        coarse = rng.normal(rng.uniform(-1, 1), 1, (3, 3)).astype(np.float32)
        patches = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        depth = np.asarray(patches) * width / 4
    share = (depth / rng.uniform(1, 12)).clip(-0.5, 0.5).astype(np.float32) + np.float32(0.5)
    second = shade(rng, int(rng.integers(len(COLOURS))))
    first = sprite.paint.reshape(-1, 3)[0]
    if np.linalg.norm(second - first) < STRANGE:
        return sprite
    taken = float((share * sprite.mask).sum() / sprite.mask.sum())
    colour = sprite.colour if taken < 0.15 else MIXED if 0.4 < taken < 0.85 else UNSURE
    return replace(sprite, colour=colour, paint=(first + share[..., None] * (second - first)).astype(np.float32))


def strange_colour(rng: np.random.Generator, sprite: Sprite) -> Sprite:
    """A colour that is far from every one of the palette, and no background either."""
    while True:
        paint = rng.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(_PALETTE - paint, axis=1).min() > STRANGE and paint.max() > 110:
            return replace(sprite, colour=MIXED, paint=paint)


DEFECTS: tuple[Callable[[np.random.Generator, Sprite], Sprite], ...] = (
    bite,
    stretch,
    bend,
    blend,
    two_tone,
    strange_colour,
)


def _renamed(sprite: Sprite, value: float, *, slight: float, heavy: float) -> int:
    """Its own kind above `slight`, "other" below `heavy`. A hurt letter may be another letter: that is unsure."""
    if value >= slight:
        return sprite.kind
    return OTHER if value <= heavy and sprite.kind != LETTER else UNSURE


def _whole(sprite: Sprite, mask: Mask, kind: int) -> Sprite:
    """Another mask; a paint per pixel no longer fits and is replaced by its first."""
    return replace(sprite, mask=mask, kind=kind, paint=sprite.paint.reshape(-1, 3)[0])


def _cropped(sprite: Sprite, mask: Mask) -> Sprite:
    """Without empty borders, so that the box's centre is the ink's."""
    rows, columns = np.flatnonzero((mask > 0.3).any(1)), np.flatnonzero((mask > 0.3).any(0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    paint = sprite.paint if sprite.paint.ndim == 1 else sprite.paint[box]
    return replace(sprite, mask=np.ascontiguousarray(mask[box]), paint=paint)


def _resized(mask: Mask, wider: float, higher: float) -> Mask:
    size = (max(2, round(mask.shape[1] * wider)), max(2, round(mask.shape[0] * higher)))
    image = Image.fromarray(np.rint(mask * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32) / np.float32(255)
