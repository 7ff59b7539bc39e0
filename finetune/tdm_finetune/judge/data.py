"""Training pictures of the second judge, with what is where: reproducible from (seed, step) alone.

Drawn with the world's masks and colours but composed here, wider than the world: any number of objects, letters among
shapes, objects that touch, damaged ones, and whole pictures that are blurred, noisy or tinted as a generator's are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from tdm_finetune.judge.net import CELL
from tdm_finetune.judge.sprites import (
    OTHER,
    UNSURE,
    Sprite,
    damaged,
    draw_blob,
    draw_letter,
    draw_shape,
)
from tdm_finetune.scenes.world import BACKGROUND, COLOURS, SHAPES, SIZE

COUNTS = np.array([1, 9, 8, 5, 5, 2, 1]) / 31  # how often a scattered scene has 0, 1, ... 6 objects
GRID = SIZE // CELL


@dataclass(frozen=True, slots=True)
class Label:
    """One object that a picture shows, its centre in pixels."""

    x: float
    y: float
    kind: int
    colour: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures in [-1, 1], and per cell of the grid what the detector should say."""

    pictures: Tensor  # (B, 3, SIZE, SIZE)
    present: Tensor  # (B, GRID, GRID): 1 where an object's centre lies
    kind: Tensor  # (B, GRID, GRID) index into KINDS or UNSURE, at centres and the cells around them
    colour: Tensor  # (B, GRID, GRID) likewise
    offset: Tensor  # (B, 2, GRID, GRID): from a cell's middle to the nearest centre, x then y, in cells; NaN afar


class Canvas:
    """A picture that is being drawn, and what it shows so far."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.pixels = np.empty((SIZE, SIZE, 3), dtype=np.float32)
        self.pixels[:] = np.array(BACKGROUND) + rng.uniform(-5, 5, 3)
        self.owner = np.full((SIZE, SIZE), -1, dtype=np.int64)
        self.labels: list[Label] = []

    def free(self, box: tuple[int, int, int, int], gap: int) -> bool:
        """True if nothing lies within `gap` pixels of (left, top, width, height)."""
        left, top, width, height = box
        return bool(
            (self.owner[max(0, top - gap) : top + height + gap, max(0, left - gap) : left + width + gap] < 0).all()
        )

    def paste(self, sprite: Sprite, left: int, top: int) -> None:
        """Draws a sprite. It and what it touches are no longer separate objects: both become "other"."""
        height, width = sprite.mask.shape
        place = (slice(top, top + height), slice(left, left + width))
        ink = sprite.mask > 0.5
        around = np.asarray(ndimage.binary_dilation(ink, iterations=2), dtype=np.bool_)
        touched = set(self.owner[place][around].tolist()) - {-1}
        patch = self.pixels[place]
        patch += sprite.mask[..., None] * (sprite.paint - patch)
        self.owner[place][ink] = len(self.labels)
        kind = OTHER if touched else sprite.kind
        for index in touched:
            old = self.labels[index]
            self.labels[index] = Label(old.x, old.y, OTHER, UNSURE)
        colour = UNSURE if touched else sprite.colour
        self.labels.append(Label(left + width / 2, top + height / 2, kind, colour))


def compose(rng: np.random.Generator) -> Canvas:
    """One random picture: two in seven are words, the rest scattered objects."""
    canvas = Canvas(rng)
    faulty = rng.random() < 0.5
    if rng.random() < 2 / 7:
        _word(canvas, rng, faulty)
    else:
        _scatter(canvas, rng, faulty)
    if faulty and rng.random() < 0.3:
        _place(canvas, rng, draw_blob(rng, int(rng.integers(len(COLOURS)))))
    return canvas


def _scatter(canvas: Canvas, rng: np.random.Generator, faulty: bool) -> None:
    count = int(rng.choice(len(COUNTS), p=COUNTS))
    alike = rng.random() < 0.5
    shape, colour = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
    low, high = (22, 40) if count > 2 else (26, 59)
    for _ in range(count):
        if not alike:
            shape, colour = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
        letter = rng.random() < 0.05
        sprite = draw_letter(rng, colour) if letter else draw_shape(rng, shape, int(rng.integers(low, high)), colour)
        if faulty and rng.random() < 0.4:
            sprite = damaged(rng, sprite)
        _place(canvas, rng, sprite, collide=faulty and rng.random() < 0.15)


def _place(canvas: Canvas, rng: np.random.Generator, sprite: Sprite, collide: bool = False) -> None:
    """Somewhere free, or on top of what is there; not at all if there is no room."""
    height, width = sprite.mask.shape
    if max(height, width) > SIZE - 2:
        return
    for _ in range(30):
        left, top = int(rng.integers(1, SIZE - width)), int(rng.integers(1, SIZE - height))
        if canvas.free((left, top, width, height), gap=3) != collide:
            canvas.paste(sprite, left, top)
            return


def _word(canvas: Canvas, rng: np.random.Generator, faulty: bool) -> None:
    """One to four letters in a row, mostly of one colour."""
    colour = int(rng.integers(len(COLOURS)))
    sprites: list[Sprite] = []
    for _ in range(int(rng.integers(1, 5))):
        sprite = draw_letter(rng, int(rng.integers(len(COLOURS))) if rng.random() < 0.1 else colour)
        sprites.append(damaged(rng, sprite) if faulty and rng.random() < 0.3 else sprite)
    gap, room = int(rng.integers(3, 11)), SIZE - 2
    while sum(s.mask.shape[1] + gap for s in sprites) - gap > room:
        sprites.pop()
    if not sprites:
        return
    left = 1 + int(rng.integers(room - sum(s.mask.shape[1] + gap for s in sprites) + gap + 1))
    bottom = int(rng.integers(66, 100))
    for sprite in sprites:
        height, width = sprite.mask.shape
        canvas.paste(sprite, left, max(0, bottom - height + int(rng.integers(-2, 3))))
        left += width + gap


def batch(size: int, seed: int, step: int) -> Batch:
    """Batch `step` of the stream that `seed` names."""
    rng = np.random.default_rng((seed, step))
    scenes = [compose(rng) for _ in range(size)]
    blur = np.where(rng.random(size) < 0.5, 0.0, rng.uniform(0.2, 1.3, size))
    heavy = rng.random(size) < 0.04
    blur[heavy] = rng.uniform(2.5, 5.0, int(heavy.sum()))
    pictures = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1.0
    pictures = _noisy(_blurred(_warped(pictures, rng), blur), rng)
    labels = [
        [Label(o.x, o.y, OTHER, UNSURE) for o in scene.labels] if ruined else scene.labels
        for scene, ruined in zip(scenes, heavy, strict=True)
    ]
    return Batch(pictures, *targets(labels))


def targets(labels: list[list[Label]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """present, kind, colour and offset of `Batch` for the objects of each picture."""
    middles = (np.arange(GRID) + 0.5) * CELL
    count = len(labels)
    present = np.zeros((count, GRID, GRID), dtype=np.float32)
    kind, colour = (np.full((count, GRID, GRID), UNSURE, dtype=np.int64) for _ in range(2))
    offset = np.full((count, 2, GRID, GRID), np.nan, dtype=np.float32)
    for index, objects in enumerate(labels):
        if not objects:
            continue
        x = np.array([o.x for o in objects])[:, None, None] - middles[None, None, :]
        y = np.array([o.y for o in objects])[:, None, None] - middles[None, :, None]
        reach = np.maximum(np.abs(x), np.abs(y)) / CELL  # (objects, GRID, GRID), 0.5 at the border of the own cell
        nearest, close = reach.argmin(0), reach.min(0) < 1.0
        present[index] = reach.min(0) <= 0.5
        kind[index][close] = np.array([o.kind for o in objects])[nearest[close]]
        colour[index][close] = np.array([o.colour for o in objects])[nearest[close]]
        for axis, distance in enumerate(np.broadcast_arrays(x, y)):
            chosen = np.take_along_axis(distance, nearest[None], axis=0)[0] / CELL
            offset[index, axis][close] = chosen[close]
    return torch.from_numpy(present), torch.from_numpy(kind), torch.from_numpy(colour), torch.from_numpy(offset)


def _warped(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the pictures with wavy edges, up to a pixel and a half away."""
    size = len(pictures)
    reach = np.where(rng.random(size) < 0.5, 0.0, rng.uniform(0, 1.5, size)) * 2 / SIZE
    coarse = rng.uniform(-1, 1, (size, 2, 24, 24)) * reach[:, None, None, None]
    shift = F.interpolate(_tensor(coarse), size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    axis = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1) + shift.permute(0, 2, 3, 1)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _blurred(pictures: Tensor, sigma: NDArray[np.float64]) -> Tensor:
    """A Gaussian blur per picture, `sigma` (B,) in pixels."""
    size, radius = len(pictures), 9
    x = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (x / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    weight = _tensor(kernel / kernel.sum(1, keepdims=True)).repeat_interleave(3, 0)[:, None, None]
    flat = F.pad(pictures.reshape(1, size * 3, SIZE, SIZE), (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, weight, groups=size * 3), weight.transpose(2, 3), groups=size * 3)
    return flat.view(pictures.shape)


def _noisy(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Grain, coarse stains as an autoencoder leaves them, and a tint; each in half of the pictures."""
    size = len(pictures)
    grain, stain, tint = (
        _tensor(np.where(rng.random(size) < 0.5, 0.0, rng.uniform(0, top, size)) / 127.5).view(-1, 1, 1, 1)
        for top in (10, 8, 6)
    )
    fine = _tensor(rng.standard_normal((size, 3, SIZE, SIZE), dtype=np.float32))
    coarse = F.interpolate(_tensor(rng.standard_normal((size, 3, GRID, GRID))), scale_factor=CELL, mode="bilinear")
    pictures = pictures + grain * fine + stain * coarse + tint * _tensor(rng.uniform(-1, 1, (size, 3, 1, 1)))
    levels = ((pictures + 1) * 127.5).round().clamp(0, 255)  # as stored pictures have them
    return levels / 127.5 - 1


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
