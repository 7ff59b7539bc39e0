"""An engine beside eager execution, graph by graph: while it makes fixed pictures, every call goes to both.

Each graph gets what eager computed before it, so errors do not add up. What is common to graphs and eager, a family's
tokens and padding, is compared by whole pictures (`verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdm_exporters.parts import Part
from tdm_serve.artifact import Size
from tdm_serve.backends.parts import Parts
from tdm_serve.core import Request
from tdm_serve.engine import Engine

PROMPTS = ("two red circles", "a blue ring to the left of a yellow star", "a white cross")
SEED = 1000


class Error(NamedTuple):
    """How far one output is from eager's: the largest difference by the largest value, and mean by mean."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Found:
    """One comparison: of which graph, and where."""

    part: str
    where: str
    error: Error


def error(ours: Tensor, eager: Tensor) -> Error:
    """Infinite where our numbers are none."""
    if ours.shape != eager.shape or not bool(ours.isfinite().all()):
        return Error(float("inf"), float("inf"))
    away, size = (ours.double() - eager.double()).abs(), eager.double().abs()
    tiny = torch.finfo(torch.float64).tiny
    return Error(float(away.max() / (size.max() + tiny)), float(away.mean() / (size.mean() + tiny)))


class Beside:
    """The graphs of an engine; while it `watch`es, eager functions run beside them, and theirs are the results."""

    def __init__(self, eager: Mapping[str, Callable[..., Tensor]]) -> None:
        """`eager` by part, each with the part's inputs in their order."""
        self._eager = eager
        self._parts: Any = None
        self._where = ""
        self.found: list[Found] = []

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Beside:
        return cls({part.name: part.expected for part in parts})

    def over(self, parts: Parts) -> Beside:
        """Puts itself before the graphs that are opened."""
        self._parts = parts
        return self

    @property
    def exact_on_cpu(self) -> bool:
        return self._parts.exact_on_cpu

    @contextmanager
    def watch(self, where: str) -> Generator[None]:
        """Compares every call of the block; `where` is for people."""
        self._where = where
        try:
            yield
        finally:
            self._where = ""

    def run(self, part: str, inputs: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        output = self._parts.run(part, inputs, shape)
        if not self._where:
            return output
        expected = self._eager[part](*inputs.values())
        self.found.append(Found(part, self._where, error(output, expected)))
        return expected


def requests(sizes: Sequence[Size]) -> list[Request]:
    """The pictures that are compared: every prompt in every size, cut where an engine reads less of it."""
    return [
        Request(prompt, SEED + index, width, height, truncate_prompt=True)
        for width, height in sizes
        for index, prompt in enumerate(PROMPTS)
    ]


@torch.inference_mode()
def compare(exported: Engine, beside: Beside, sizes: Sequence[Size], batch: int) -> list[Found]:
    """Every graph on every picture, one picture at a time, and the denoiser on a full batch.

    `exported` runs on `beside`.
    """
    for request in requests(sizes):
        _one(exported, beside, request)
    for width, height in sizes:
        wanted = [Request(PROMPTS[0], SEED + i, width, height, truncate_prompt=True) for i in range(batch)]
        with beside.watch(f"a batch of {batch}, {width}x{height}"):
            samples = exported.start(wanted)
            each = ((one.latents, exported.model.timed(one.row, one.text), one.text) for one in samples)
            columns = zip(*each, strict=True)
            latents, modulation, text = (torch.cat(column) for column in columns)
            exported.model.denoiser(latents.to(exported.model.dtype), modulation, text)
    return beside.found


def _one(engine: Engine, beside: Beside, request: Request) -> None:
    what = f"{request.prompt!r}, {request.width}x{request.height}"
    with beside.watch(what):
        [sample] = engine.start([request])
    while not sample.done:
        with beside.watch(f"step {sample.index + 1} of {what}"):
            engine.step([sample])
    with beside.watch(what):
        engine.model.decode([sample.latents])


def worst(found: Sequence[Found]) -> Mapping[str, Found]:
    """Of each graph, the comparison with the largest error."""
    parts: dict[str, Found] = {}
    for one in found:
        if one.part not in parts or one.error.largest > parts[one.part].error.largest:
            parts[one.part] = one
    return parts
