"""A device with a virtual clock: arrivals and costs in, completions, promises and refusals out.

Tests use it, and benchmarks compare the real server with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tdm_serve.core import Shape
from tdm_serve.scheduler.nouns import Costs, Idle, Policy, Promise, Refusal, Run, Stage, Work
from tdm_serve.scheduler.scheduler import DEFAULT, Scheduler


@dataclass(frozen=True, slots=True)
class Arrival:
    """A ticket comes: all its pictures at once."""

    at_ms: float
    works: tuple[Work, ...]


@dataclass(slots=True)
class Result:
    """What became of one ticket. A refused one has a `refusal`; an accepted one a promise, and an end if it ran."""

    arrival: Arrival
    promise: Promise | None = None
    refusal: Refusal | None = None
    ended_ms: float | None = None

    @property
    def took_ms(self) -> float:
        """From arrival to the last picture; infinite where that never came."""
        return float("inf") if self.ended_ms is None else self.ended_ms - self.arrival.at_ms

    @property
    def error(self) -> float:
        """(actual - promised) / promised; above 0 is late."""
        assert self.promise is not None
        return self.took_ms / self.promise.eta_ms - 1


@dataclass(slots=True)
class Trace:
    """What became of all, by ticket, and every run with when it began and ended."""

    results: dict[int, Result] = field(default_factory=dict[int, Result])
    runs: list[tuple[float, float, Run]] = field(default_factory=list[tuple[float, float, Run]])

    @property
    def accepted(self) -> list[Result]:
        return [result for result in self.results.values() if result.promise is not None]

    @property
    def refused(self) -> list[Result]:
        return [result for result in self.results.values() if result.refusal is not None]

    def late(self, part: float = 0.1) -> float:
        """The part of accepted tickets that came later than promised by more than `part` of the promise."""
        return sum(result.error > part for result in self.accepted) / max(1, len(self.accepted))

    def goodput(self, since_ms: float, until_ms: float, part: float = 0.1) -> float:
        """Pictures a second of tickets that ended in the window, and not later than promised by more than `part`."""
        ended = [result for result in self.accepted if result.ended_ms is not None and result.error <= part]
        inside = [result for result in ended if since_ms <= (result.ended_ms or 0.0) < until_ms]
        return 1000 * sum(len(result.arrival.works) for result in inside) / (until_ms - since_ms)


def simulate(
    arrivals: Sequence[Arrival],
    costs: Costs,
    policy: Policy = DEFAULT,
    *,
    noise: float = 0.0,
    seed: int = 0,
    believed: Costs | None = None,
) -> Trace:
    """Runs all arrivals to the end. `noise` is the standard deviation of a run's real cost, as a part of it.

    `costs` is what runs take; the scheduler goes by `believed` where that differs.
    """
    device = _Device(Scheduler(believed or costs, policy), costs, noise, random.Random(seed))
    for arrival in sorted(arrivals, key=lambda arrival: arrival.at_ms):
        device.run_until(arrival.at_ms)
        device.arrive(arrival)
    device.run_until(float("inf"))
    return device.trace


def capacity(costs: Costs, shape: Shape, steps: int) -> float:
    """Pictures a second of this kind under a backlog."""
    batch = costs.best_batch(shape)
    denoise_ms = costs.start_ms(shape, batch, 0) + steps * costs.step_ms(shape, batch, 1)
    decode_ms = min(costs.finish_ms(shape, count) / count for count in range(1, batch + 1))
    return 1000 / (denoise_ms / batch + decode_ms)


class _Device:
    """Does one run at a time, as the scheduler says; works that arrive meanwhile are offered meanwhile."""

    def __init__(self, scheduler: Scheduler, costs: Costs, noise: float, chance: random.Random) -> None:
        self.trace = Trace()
        self._scheduler = scheduler
        self._costs = costs
        self._noise = noise
        self._chance = chance
        self._now = 0.0
        self._open: tuple[float, Run] | None = None  # when it ends
        self._works: dict[int, Work] = {}
        self._left: dict[int, int] = {}

    def arrive(self, arrival: Arrival) -> None:
        answer = self._scheduler.offer(arrival.works, arrival.at_ms)
        result = self.trace.results[arrival.works[0].ticket] = Result(arrival)
        if isinstance(answer, Refusal):
            result.refusal = answer
            return
        result.promise = answer
        self._works |= {work.id: work for work in arrival.works}
        self._left[arrival.works[0].ticket] = len(arrival.works)

    def run_until(self, until_ms: float) -> None:
        """Runs what is there, up to that moment; a run may be open then."""
        while True:
            if self._open is None and not self._begin():
                self._now = max(self._now, until_ms) if until_ms < float("inf") else self._now
                return
            assert self._open is not None
            ends_ms, run = self._open
            if ends_ms > until_ms:
                return
            self._now, self._open = ends_ms, None
            for number in self._scheduler.done(run, ends_ms):
                self._end(number)

    def _begin(self) -> bool:
        run = self._scheduler.next(self._now)
        if isinstance(run, Idle):
            return False
        ends_ms = self._now + self._cost_ms(run)
        self._open = ends_ms, run
        self.trace.runs.append((self._now, ends_ms, run))
        return True

    def _cost_ms(self, run: Run) -> float:
        works = [self._works[number] for number in run.ids]
        shape, count = works[0].shape, len(works)
        factor = max(0.1, self._chance.gauss(1.0, self._noise))
        if run.stage is Stage.START:
            return factor * self._costs.start_ms(shape, count, sum(work.cached for work in works))
        if run.stage is Stage.STEP:
            return factor * self._costs.step_ms(shape, count, len({work.model for work in works}))
        return factor * self._costs.finish_ms(shape, count)

    def _end(self, number: int) -> None:
        ticket = self._works.pop(number).ticket
        self._left[ticket] -= 1
        if not self._left[ticket]:
            self.trace.results[ticket].ended_ms = self._now
