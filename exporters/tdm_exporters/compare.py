"""An engine beside eager execution, graph by graph: both get what eager computed, at every step of fixed pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tdm_serve.artifact import Size
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.models.autoencoder import decode
from tdm_serve.models.families.zimage import ZImage

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


def requests(sizes: Sequence[Size]) -> list[Request]:
    """The pictures that are compared: every prompt in every size."""
    return [
        Request(prompt, SEED + index, width, height) for width, height in sizes for index, prompt in enumerate(PROMPTS)
    ]


@torch.inference_mode()
def compare(eager: Engine, exported: Engine, sizes: Sequence[Size], batch: int) -> Iterator[Found]:
    """Every graph on every picture, one picture at a time, and the denoiser on a full batch."""
    ours, theirs = _family(exported), _family(eager)
    for request in requests(sizes):
        yield from _one(eager, theirs, ours, request)
    for width, height in sizes:
        yield _batch(eager, theirs, ours, [Request(PROMPTS[0], SEED + i, width, height) for i in range(batch)])


def _one(engine: Engine, theirs: ZImage, ours: ZImage, request: Request) -> Iterator[Found]:
    what = f"{request.prompt!r}, {request.width}x{request.height}"
    tokens = theirs.tokens(request.prompt)
    [features] = theirs.encode([tokens])
    yield Found("text_encoder", what, error(ours.encode([tokens])[0], features))
    [sample] = engine.start([request])
    yield Found("refiner", what, error(ours.refine(features, sample.text.shape[1]), sample.text))
    while not sample.done:
        where, row = f"step {sample.index + 1} of {what}", sample.row
        modulation = theirs.timed(row, sample.text)
        yield Found("modulation", where, error(ours.timed(row, sample.text), modulation))
        inputs = sample.latents.to(theirs.dtype), modulation, sample.text
        yield Found("denoiser", where, error(ours.denoiser(*inputs), theirs.denoiser(*inputs)))
        engine.step([sample])
    raw = sample.latents.to(theirs.dtype) / theirs.scale + theirs.shift
    yield Found("decoder", what, error(decode(ours.vae, raw), decode(theirs.vae, raw)))


def _batch(engine: Engine, theirs: ZImage, ours: ZImage, wanted: Sequence[Request]) -> Found:
    """Pictures in one forward; eager's own, one by one."""
    samples = engine.start(wanted)
    inputs = [(one.latents.to(theirs.dtype), theirs.timed(one.row, one.text), one.text) for one in samples]
    expected = torch.cat([theirs.denoiser(*each) for each in inputs])
    together = ours.denoiser(*(torch.cat(column) for column in zip(*inputs, strict=True)))
    what = f"a batch of {len(wanted)}, {wanted[0].width}x{wanted[0].height}"
    return Found("denoiser", what, error(together, expected))


def _family(engine: Engine) -> ZImage:
    assert isinstance(engine.model, ZImage)
    return engine.model


def worst(found: Sequence[Found]) -> Mapping[str, Found]:
    """Of each graph, the comparison with the largest error."""
    parts: dict[str, Found] = {}
    for one in found:
        if one.part not in parts or one.error.largest > parts[one.part].error.largest:
            parts[one.part] = one
    return parts
