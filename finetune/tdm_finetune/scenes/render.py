"""Draws a scene: anti-aliased shapes or letters that never touch, at random places and sizes."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tdm_finetune.scenes.world import BACKGROUND, COLOURS, SIZE, Spec, Thing, pair_is_held_out

SUPERSAMPLE = 4
MARGIN = 6  # pixels between an object and the border
GAP = 8  # pixels between two objects, so that they stay separate after a VAE
LETTER_HEIGHT = 36  # pixels of a capital letter
LETTER_WIDTH = 34  # wider letters are condensed, so that three of the widest still fit
LETTER_GAP = 7
LETTER_STROKE = 2

Mask = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, width, height


def _star(size: float) -> list[tuple[float, float]]:
    """Five points, stretched to fill its box."""
    radii = (0.5, 0.22)
    raw = [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]
    left, top = min(x for x, _ in raw), min(y for _, y in raw)
    width, height = max(x for x, _ in raw) - left, max(y for _, y in raw) - top
    return [((x - left) / width * size, (y - top) / height * size) for x, y in raw]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, size: int) -> None:
    end = size - 1
    match shape:
        case "circle":
            draw.ellipse((0, 0, end, end), fill=255)
        case "square":
            draw.rectangle((0, 0, end, end), fill=255)
        case "triangle":
            draw.polygon([(size / 2, 0), (end, end), (0, end)], fill=255)
        case "star":
            draw.polygon(_star(end), fill=255)
        case "cross":
            a, b = size * 0.33, size * 0.67
            draw.rectangle((a, 0, b, end), fill=255)
            draw.rectangle((0, a, end, b), fill=255)
        case "ring":
            draw.ellipse((0, 0, end, end), fill=255)
            hole = size * 0.27
            draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
        case _:
            raise ValueError(f"shape {shape!r} is unknown")


@cache
def shape_mask(shape: str, size: int) -> Mask:
    """Coverage in [0, 1] of a shape in its own size x size box."""
    side = size * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    _draw_shape(ImageDraw.Draw(canvas), shape, side)
    return _coverage(canvas)


@cache
def letter_mask(letter: str) -> Mask:
    """Coverage in [0, 1] of a capital letter, cropped to its ink; caps are about LETTER_HEIGHT pixels high."""
    font = ImageFont.load_default(size=LETTER_HEIGHT * SUPERSAMPLE * 1.35)
    side = LETTER_HEIGHT * SUPERSAMPLE * 2
    canvas = Image.new("L", (side, side))
    stroke = LETTER_STROKE * SUPERSAMPLE // 2
    ImageDraw.Draw(canvas).text((60, 20), letter, font=font, fill=255, stroke_width=stroke)
    left, top, right, bottom = canvas.getbbox() or (0, 0, 1, 1)
    width = -(-(right - left) // SUPERSAMPLE) * SUPERSAMPLE
    height = -(-(bottom - top) // SUPERSAMPLE) * SUPERSAMPLE
    ink = canvas.crop((left, top, left + width, top + height))
    if width > LETTER_WIDTH * SUPERSAMPLE:
        ink = ink.resize((LETTER_WIDTH * SUPERSAMPLE, height))
    return _coverage(ink)


def _coverage(drawn: Image.Image) -> Mask:
    """The supersampled drawing at its own size, 255 as 1."""
    return np.asarray(drawn.reduce(SUPERSAMPLE), dtype=np.float32) / np.float32(255)


def _paste(canvas: Mask, mask: Mask, left: int, top: int, colour: str) -> None:
    height, width = mask.shape
    patch = canvas[top : top + height, left : left + width]
    patch += mask[..., None] * (np.array(COLOURS[colour], dtype=np.float32) - patch)


def _apart(a: Box, b: Box) -> bool:
    return (
        a[0] + a[2] + GAP <= b[0] or b[0] + b[2] + GAP <= a[0] or a[1] + a[3] + GAP <= b[1] or b[1] + b[3] + GAP <= a[1]
    )


def _scatter(rng: random.Random, sizes: list[int]) -> list[Box]:
    """Boxes that do not touch; starts over when a draw has painted itself into a corner."""
    while True:
        boxes: list[Box] = []
        for size in sizes:
            for _ in range(40):
                limit = SIZE - MARGIN - size
                box = (rng.randint(MARGIN, limit), rng.randint(MARGIN, limit), size, size)
                if all(_apart(box, other) for other in boxes):
                    boxes.append(box)
                    break
        if len(boxes) == len(sizes):
            return boxes


def _related(rng: random.Random, sizes: list[int], relation: str) -> list[Box]:
    """Two boxes side by side (or stacked), a little off axis; the first is `relation` the second."""
    room = SIZE - 2 * MARGIN - sum(sizes) - GAP
    before, between = sorted((rng.randint(0, room), rng.randint(0, room)))
    order = (0, 1) if relation in ("left of", "above") else (1, 0)
    along = {order[0]: MARGIN + before, order[1]: MARGIN + between + sizes[order[0]] + GAP}
    centre = rng.randint(44, SIZE - 44)
    boxes: list[Box] = []
    for index, size in enumerate(sizes):
        across = min(max(centre + rng.randint(-8, 8) - size // 2, MARGIN), SIZE - MARGIN - size)
        horizontal = relation in ("left of", "right of")
        boxes.append((along[index], across, size, size) if horizontal else (across, along[index], size, size))
    return boxes


def _pick_colour(rng: random.Random, thing: Thing, allow_held_out: bool) -> str:
    if thing.colour is not None:
        return thing.colour
    return rng.choice([c for c in COLOURS if allow_held_out or not pair_is_held_out(thing.shape, c)])


def _render_word(canvas: Mask, rng: random.Random, word: str, colour: str) -> None:
    masks = [letter_mask(letter) for letter in word]
    width = sum(mask.shape[1] for mask in masks) + LETTER_GAP * (len(word) - 1)
    left = min(max((SIZE - width) // 2 + rng.randint(-8, 8), 1), SIZE - width - 1)
    bottom = (SIZE + LETTER_HEIGHT) // 2 + rng.randint(-10, 10)
    for mask in masks:
        _paste(canvas, mask, left, bottom - mask.shape[0], colour)
        left += mask.shape[1] + LETTER_GAP


def render(spec: Spec, rng: random.Random, *, allow_held_out: bool = False) -> Pixels:
    """A true picture of `spec` as uint8 (128, 128, 3).

    Colours that the prompt leaves open avoid the held-out colour-shape pairs unless `allow_held_out`.
    """
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUND
    if spec.word is not None:
        assert spec.colour is not None
        _render_word(canvas, rng, spec.word, spec.colour)
    else:
        _render_things(canvas, rng, spec, allow_held_out)
    return np.rint(canvas).astype(np.uint8)


def _render_things(canvas: Mask, rng: random.Random, spec: Spec, allow_held_out: bool) -> None:
    things = spec.things * spec.count
    low, high = {1: (36, 56), 2: (32, 44), 3: (28, 38), 4: (26, 34)}[len(things)]
    sizes = [rng.randint(low, high)] * len(things) if spec.count > 1 else [rng.randint(low, high) for _ in things]
    boxes = _related(rng, sizes, spec.relation) if spec.relation else _scatter(rng, sizes)
    shared = _pick_colour(rng, things[0], allow_held_out) if spec.count > 1 else None
    for thing, (left, top, size, _) in zip(things, boxes, strict=True):
        colour = shared or _pick_colour(rng, thing, allow_held_out)
        _paste(canvas, shape_mask(thing.shape, size), left, top, colour)
