"""Same pixels, whatever the company: any batch mates, steps, versions, arrivals and cancellations, bit by bit on a CPU.

Expected pictures are made one by one, each version loaded alone with its adapter in the base weights and no prompt
cache, so the shared base, its routes and the cache are on trial, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdm_serve.core import Request
from tdm_serve.engine import Engine, Sample, by_shape

VERSIONS = ("default", "default-tdm", "default-teacher")
PROMPTS = (
    "a star",
    "two red circles",
    'the word "CAT" in green, éüß',
    "a blue ring to the left of a yellow star",
    "a star " * 18,  # 64 tokens after padding, where the others have 32
)
SIZES = ((64, 64), (80, 64), (64, 96))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Small and short ones; guidance and what it keeps away included."""
    width, height = draw(st.sampled_from(SIZES))
    guidance = draw(st.sampled_from((1.0, 1.0, 2.5, 0.5)))
    return Request(
        draw(st.sampled_from(PROMPTS)),
        draw(st.integers(0, 3)),
        width,
        height,
        draw(st.integers(1, 4)),
        guidance,
        "" if guidance == 1.0 else draw(st.sampled_from(("", "a red star", PROMPTS[-1]))),
        draw(st.sampled_from(VERSIONS)),
        allow_untrained_schedule=True,
    )


@dataclass(slots=True)
class Visit:
    """A request that arrives at a turn and, perhaps, leaves after another one."""

    request: Request
    arrives: int
    leaves: int | None
    sample: Sample | None = field(default=None, compare=False)


visits = st.builds(Visit, requests(), st.integers(0, 3), st.one_of(st.none(), st.none(), st.none(), st.integers(1, 3)))


@pytest.fixture(scope="module")
def together() -> Engine:
    return Engine.load(VERSIONS, device="cpu", dtype="float32")


@cache
def engine_of(version: str) -> Engine:
    return Engine.load(version, device="cpu", dtype="float32", cache_mb=0)


@cache
def alone(request: Request) -> bytes:
    """A picture made by itself."""
    [image] = engine_of(request.model).generate([request])
    return image.image.tobytes()


def play(engine: Engine, guests: list[Visit], turns: st.DataObject) -> None:
    """Runs arrivals, evaluations in drawn company and order, and endings; every picture must be as made alone."""
    turn = 0
    while any(guest.sample is None or not guest.sample.done for guest in guests):
        arriving = [guest for guest in guests if guest.sample is None and guest.arrives <= turn]
        for guest, sample in zip(arriving, engine.start([g.request for g in arriving]), strict=True):
            guest.sample = sample
        guests = [guest for guest in guests if guest.leaves is None or turn < guest.leaves]
        going = [g.sample for g in guests if g.sample is not None and not g.sample.done]
        for group in by_shape(turns.draw(st.permutations(going)) if len(going) > 1 else going):
            size = turns.draw(st.integers(1, len(group)))
            for start in range(0, len(group), size):
                engine.step(group[start : start + size])
        turn += 1
    for guest, image in zip(guests, engine.finish([g.sample for g in guests if g.sample is not None]), strict=True):
        assert image.image.tobytes() == alone(guest.request), guest.request
        assert image.nfe == guest.request.steps * (1 if guest.request.guidance == 1.0 else 2)


anything = given(guests=st.lists(visits, min_size=1, max_size=6), turns=st.data())
quick = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(quick, max_examples=20, derandomize=True)
@anything
def test_any_company_leaves_every_picture_as_it_is_alone(
    together: Engine, guests: list[Visit], turns: st.DataObject
) -> None:
    play(together, guests, turns)


@pytest.mark.slow
@settings(quick, max_examples=80)
@anything
def test_much_more_company(together: Engine, guests: list[Visit], turns: st.DataObject) -> None:
    play(together, guests, turns)


def pixels(engine: Engine, requests: list[Request]) -> np.ndarray:
    return np.stack([np.asarray(image.image).astype(int) for image in engine.generate(requests)])


MIXED = [Request(PROMPTS[i % 5], i, 64, 64, 4, 1.0, "", VERSIONS[i % 3]) for i in range(6)]


def test_adapters_kept_apart_make_nearly_the_same_pictures(together: Engine) -> None:
    """The sums round otherwise; in a batch or alone they are bitwise the same ones."""
    apart = Engine.load(VERSIONS, device="cpu", dtype="float32", adapters="separate")
    assert apart.versions.stats().bytes < 0.5 * together.versions.stats().bytes
    mixed = pixels(apart, MIXED)
    assert np.array_equal(mixed, np.concatenate([pixels(apart, [request]) for request in MIXED]))
    assert np.abs(mixed - pixels(together, MIXED)).max() <= 2


def test_without_strict_mode_pictures_differ_by_little(together: Engine) -> None:
    loose = Engine.load(VERSIONS, device="cpu", dtype="float32", strict=False)
    assert np.abs(pixels(loose, MIXED) - pixels(together, MIXED)).max() <= 2


def test_half_precision_on_a_cpu_is_a_choice_with_a_bound(together: Engine) -> None:
    """bfloat16 keeps 8 bits: company changes its pictures, and its pictures are not float32's, but nearly."""
    half = Engine.load(VERSIONS, device="cpu", dtype="bfloat16")
    mixed = pixels(half, MIXED)
    company = np.abs(mixed - np.concatenate([pixels(half, [request]) for request in MIXED]))
    precision = np.abs(mixed - pixels(together, MIXED))
    assert company.mean() <= 0.5, (company.mean(), company.max())
    assert precision.mean() <= 3.0, (precision.mean(), precision.max())


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [True, False])
def test_company_on_a_gpu(strict: bool) -> None:
    """Strict mode is bitwise there, too; else float32 pictures may differ by 2 of 255, as matrix products round."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.load(VERSIONS, device="cuda", dtype="float32", strict=strict)
    difference = np.abs(pixels(engine, MIXED) - np.concatenate([pixels(engine, [request]) for request in MIXED]))
    assert difference.max() <= (0 if strict else 2)
