"""When everything that has been accepted will be done, if nothing else comes: the decisions, run ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field

from tdm_serve.core import Shape
from tdm_serve.scheduler.nouns import Stage
from tdm_serve.scheduler.plan import Move, Plan, decide


@dataclass(slots=True)
class Forecast:
    """Moments by picture id: when those that wait begin, and when each is decoded."""

    made_ms: float
    idle_ms: float  # when nothing is left to do
    begins: dict[int, float] = field(default_factory=dict[int, float])
    ends: dict[int, float] = field(default_factory=dict[int, float])
    misses: dict[tuple[Shape, int, int], float] = field(default_factory=dict[tuple[Shape, int, int], float])
    """When newcomers at the end of this queue would have been done, by shape, steps and count, if that was too late."""


def forecast(plan: Plan, move: Move | None, left_ms: float, now_ms: float) -> Forecast:
    """Runs `plan` to its end, beginning with the open `move`, which takes `left_ms` more.

    Evaluations that nothing can interrupt are taken in one leap, so a picture costs few decisions, whatever its steps.
    """
    result = Forecast(now_ms, now_ms)
    plan, move = plan.copy(move)
    clock = now_ms
    if move is not None:
        clock += left_ms
        plan.put(move)
        _note(result, move, now_ms, clock)
    while move := decide(plan, clock):
        begun = clock
        clock += move.ms * move.repeats
        plan.take(move)
        plan.put(move)
        _note(result, move, begun, clock)
    result.idle_ms = clock
    return result


def _note(result: Forecast, move: Move, begun: float, done: float) -> None:
    if move.stage is Stage.STEP:
        return
    moments, moment = (result.ends, done) if move.stage is Stage.FINISH else (result.begins, begun)
    for seat in move.seats:
        moments[seat.picture.work.id] = moment
