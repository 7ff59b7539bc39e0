"""Holds what the detector sees and Tesseract reads to what a prompt asks for: right, or not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from tdm_finetune.judge import reading
from tdm_finetune.judge.net import Detector, Found
from tdm_finetune.scenes.render import Pixels
from tdm_finetune.scenes.world import Spec, Thing

WEIGHTS = Path(__file__).with_name("weights")
DETECTOR_FILE = "detector.safetensors"
SIDE = 128  # pixels: what the detector was trained on
CHUNK = 32
BEARINGS = ("right of", "below", "left of", "above")  # clockwise from the x axis; y points down


class Judge:
    """Verdicts of a trained detector and Tesseract."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> Judge:
        """From a folder that `tdm-serve finetune judge` has filled; the one in the package if none is named."""
        return cls(Detector.load(folder / DETECTOR_FILE))

    @staticmethod
    def missing(specs: Sequence[Spec]) -> str | None:
        """What this machine lacks to judge pictures of `specs`, as a sentence; None if it lacks nothing."""
        if any(spec.word is not None for spec in specs) and not reading.available():
            return reading.HINT
        return None

    def verdict(self, picture: Pixels, spec: Spec) -> int:
        """1 if the uint8 (128, 128, 3) picture shows what `spec` asks for, 0 otherwise."""
        return self.verdicts([picture], [spec])[0]

    def verdicts(self, pictures: Sequence[Pixels], specs: Sequence[Spec]) -> list[int]:
        """One 0 or 1 per picture; all words are read by one process.

        ValueError for pictures of another shape or type or too few specs, BackendUnavailable for words where
        Tesseract is not installed.
        """
        for picture in pictures:
            if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
                raise ValueError(
                    f"a picture is {picture.dtype} {picture.shape}; the second judge sees uint8 {(SIDE, SIDE, 3)}"
                )
        if len(pictures) != len(specs):
            raise ValueError(f"{len(pictures)} pictures and {len(specs)} specs; there must be one spec per picture")
        seen = self.look(pictures)
        worded = [index for index, spec in enumerate(specs) if spec.word is not None]
        words = dict(zip(worded, reading.read([pictures[index] for index in worded]), strict=True))
        return [
            int(shows_word(objects, words[index], spec) if index in words else shows_things(objects, spec))
            for index, (objects, spec) in enumerate(zip(seen, specs, strict=True))
        ]

    def look(self, pictures: Sequence[Pixels]) -> list[list[Found]]:
        """The objects in each picture."""
        seen: list[list[Found]] = []
        for start in range(0, len(pictures), CHUNK):
            seen += self.detector.look(torch.from_numpy(np.stack(pictures[start : start + CHUNK])))
        return seen


def shows_things(found: Sequence[Found], spec: Spec) -> bool:
    """Exactly the things that are asked for, nothing else, and each where it should be."""
    if len(found) != len(spec.things) * spec.count:
        return False
    if len(spec.things) == 1:
        return all(is_a(one, spec.things[0]) for one in found)
    if spec.relation is None:
        return _pairs_up(list(found), spec.things)
    orders = (tuple(found), tuple(reversed(found)))
    return any(
        is_a(first, spec.things[0]) and is_a(second, spec.things[1]) and bearing(first, second) == spec.relation
        for first, second in orders
    )


def shows_word(found: Sequence[Found], text: str, spec: Spec) -> bool:
    """The word as it is read, in as many letters of the right colour, and no other object."""
    assert spec.word is not None
    wanted = Counter({("letter", spec.colour): len(spec.word)})
    return text == spec.word and Counter((one.kind, one.colour) for one in found) == wanted


def is_a(found: Found, thing: Thing) -> bool:
    """A colour that is not asked for may be any, but it must be one."""
    return found.kind == thing.shape and found.colour == (thing.colour or found.colour) != "mixed"


def bearing(first: Found, second: Found) -> str:
    """Where the first lies, seen from the second: the nearest of four directions."""
    angle = math.atan2(first.y - second.y, first.x - second.x)
    return BEARINGS[round(angle / (math.pi / 2)) % 4]


def _pairs_up(found: list[Found], things: Sequence[Thing]) -> bool:
    """True if every thing can have an object of its own."""
    if not things:
        return not found
    return any(
        is_a(one, things[0]) and _pairs_up(found[:index] + found[index + 1 :], things[1:])
        for index, one in enumerate(found)
    )


@cache
def shipped() -> Judge:
    """The judge whose weights are in the package; read once."""
    return Judge.load()


def verdict(picture: Pixels, spec: Spec) -> int:
    """`Judge.verdict` of the shipped judge."""
    return shipped().verdict(picture, spec)


def verdicts(pictures: Sequence[Pixels], specs: Sequence[Spec]) -> list[int]:
    """`Judge.verdicts` of the shipped judge."""
    return shipped().verdicts(pictures, specs)
