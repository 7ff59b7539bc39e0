"""Two measured devices: a CPU, where batches gain little, and a GPU, where they gain much; and works to offer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from tdm_serve.core import Shape
from tdm_serve.profile import Device, Profile
from tdm_serve.scheduler import Stage, Work
from tdm_serve.scheduler.simulate import Arrival

SMALL, LARGE = Shape(256, 256, 64), Shape(512, 512, 64)
MakeWork = Callable[..., Work]
MakeArrivals = Callable[..., list[Arrival]]


def measured(steps: dict[int, float], start: float, decode: Callable[[int], float]) -> Profile:
    profile = Profile(Device("device", 2, "float32", "eager", "hash"))
    for batch, ms in steps.items():
        profile.observe(Stage.START, SMALL, batch, start * batch)
        profile.observe(Stage.STEP, SMALL, batch, ms)
        profile.observe(Stage.FINISH, SMALL, batch, decode(batch))
    return profile


@pytest.fixture
def cpu() -> Profile:
    return measured({1: 7.4, 2: 10.6, 4: 23.0, 8: 53.0}, 6.0, lambda batch: 25.0 * batch)


@pytest.fixture
def gpu() -> Profile:
    return measured({1: 20.0, 2: 21.0, 4: 24.0, 8: 32.0, 16: 60.0}, 1.0, lambda batch: 8.0 + 7.0 * batch)


@pytest.fixture
def small() -> Shape:
    return SMALL


@pytest.fixture
def large() -> Shape:
    return LARGE


@pytest.fixture
def work() -> MakeWork:
    """A picture of a ticket of its own, unless told otherwise."""
    numbers = itertools.count()

    def make(
        shape: Shape = SMALL, *, ticket: int | None = None, steps: int = 4, model: str = "m", **terms: object
    ) -> Work:
        number = next(numbers)
        at_ms = float(terms.pop("at_ms", 0.0))  # type: ignore[arg-type]
        return Work(number, number if ticket is None else ticket, shape, model, steps, at_ms, **terms)  # type: ignore[arg-type]

    return make


@pytest.fixture
def poisson() -> MakeArrivals:
    """Tickets of one picture, so many a second on average."""

    def make(
        rate: float, seconds: float, *, seed: int = 0, shapes: tuple[Shape, ...] = (SMALL,), tenants: int = 1
    ) -> list[Arrival]:
        chance = random.Random(seed)
        arrivals: list[Arrival] = []
        at_ms = chance.expovariate(rate / 1000)
        while at_ms < 1000 * seconds:
            number = len(arrivals)
            tenant = str(chance.randrange(tenants))
            made = Work(number, number, chance.choice(shapes), "m", 4, at_ms, tenant=tenant)
            arrivals.append(Arrival(at_ms, (made,)))
            at_ms += chance.expovariate(rate / 1000)
        return arrivals

    return make
