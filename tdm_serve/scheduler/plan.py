"""Who is where, and the one decision: what the device does next. Real runs and forecasts go through the same code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from tdm_serve.scheduler.lanes import Lane
from tdm_serve.scheduler.nouns import Stage, Work


@dataclass(slots=True, eq=False)
class Picture:
    """A work with what admission decided for it. Forecasts share pictures with reality, so they never change one."""

    work: Work
    lane: Lane
    tag: float = 0.0  # fair virtual time at which it begins
    key: float = 0.0  # its place among what waits: smaller is earlier
    share_ms: float = 0.0  # what it takes of the device
    due_ms: float = float("inf")  # no later arrival may delay it beyond this
    firm: bool = True  # whether that goes for those that join its batch, too; else they may come as they like
    leeway_ms: float = 0.0  # what admission allows on top; none for firm ones
    joins: bool = True  # may run with pictures of its shape ahead of earlier ones of another shape
    urgent: bool = False  # its deadline needs it to run before what has begun


@dataclass(slots=True, eq=False)
class Seat:
    """A picture that has begun, and how many evaluations it still needs."""

    picture: Picture
    left: int


@dataclass(slots=True, eq=False)
class Move:
    """What the device does next, `repeats` times over if nothing arrives meanwhile; `ms` each time."""

    stage: Stage
    seats: list[Seat]
    ms: float
    repeats: int = 1


class Plan:
    """What waits, in order; what has begun, in order; what is to be decoded, in order."""

    __slots__ = ("active", "finishing", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Picture] = []
        self.active: list[Seat] = []
        self.finishing: list[Seat] = []

    def copy(self, move: Move | None) -> tuple[Plan, Move | None]:
        """A plan to play with, and the open `move` in terms of its seats."""
        twins = {id(seat): Seat(seat.picture, seat.left) for seat in (*self.active, *self.finishing)}
        twin = Plan()
        twin.waiting = self.waiting.copy()
        twin.active = [twins[id(seat)] for seat in self.active]
        twin.finishing = [twins[id(seat)] for seat in self.finishing]
        if move is None:
            return twin, None
        seats = [twins.get(id(seat)) or Seat(seat.picture, seat.left) for seat in move.seats]
        return twin, Move(move.stage, seats, move.ms)

    def take(self, move: Move) -> None:
        """The device begins `move`."""
        if move.stage is not Stage.START:
            return
        taken = len(move.seats)
        if all(seat.picture is picture for seat, picture in zip(move.seats, self.waiting, strict=False)):
            del self.waiting[:taken]
        else:
            gone = {id(seat.picture) for seat in move.seats}
            self.waiting = [picture for picture in self.waiting if id(picture) not in gone]

    def put(self, move: Move, gone: Collection[int] = ()) -> None:
        """The device has done `move`, `repeats` times; the pictures with ids in `gone` leave."""
        seats = [seat for seat in move.seats if seat.picture.work.id not in gone] if gone else move.seats
        if move.stage is Stage.FINISH:
            self.finishing = _without(self.finishing, move.seats)
        elif move.stage is Stage.START:
            urgent = seats[:1] and seats[0].picture.urgent
            self.active = seats + self.active if urgent else self.active + seats
        else:
            for seat in seats:
                seat.left -= move.repeats
            ready = [seat for seat in seats if seat.left <= 0]
            leave = ready + [seat for seat in move.seats if seat.picture.work.id in gone] if gone else ready
            if leave:
                self.active = _without(self.active, leave)
                self.finishing += ready

    def remove(self, ids: Collection[int]) -> None:
        """Pictures that are in no open move leave."""
        self.waiting = [picture for picture in self.waiting if picture.work.id not in ids]
        self.active = [seat for seat in self.active if seat.picture.work.id not in ids]
        self.finishing = [seat for seat in self.finishing if seat.picture.work.id not in ids]


def decide(plan: Plan, now_ms: float) -> Move | None:
    """The next move, or None where there is nothing to do.

    Decode what is ready; let an urgent picture in; go on with what has begun, filled up to the best batch by those
    whose coming breaks no promise; begin the oldest of what waits, with its like.
    """
    if plan.finishing and (move := _decode(plan, now_ms)):
        return move
    waiting, active = plan.waiting, plan.active
    if waiting and waiting[0].urgent and not (active and active[0].picture.urgent):
        return _begin([picture for picture in _like(waiting, waiting[0].lane, []) if picture.urgent])
    if not active:
        return _begin(_harmless([], _like(waiting, waiting[0].lane, []), now_ms)) if waiting else None
    group, ms = _group(active)
    lane = group[0].picture.lane
    repeats = min([seat.left for seat in group])
    if waiting and len(group) == len(active) and len(group) < lane.best:
        found = _like(waiting, lane, group)
        if found and (joining := _harmless(group, found, now_ms)):
            return _begin(joining)
        repeats = 1 if found else repeats
    return Move(Stage.STEP, group, ms, repeats)


def _begin(pictures: Sequence[Picture]) -> Move:
    cached = sum([picture.work.cached for picture in pictures])
    seats = [Seat(picture, picture.work.steps) for picture in pictures]
    return Move(Stage.START, seats, pictures[0].lane.start(len(pictures), cached))


def _group(active: Sequence[Seat]) -> tuple[list[Seat], float]:
    """The batch that the first picture is in, and what an evaluation of it takes, in ms."""
    lead = active[0].picture
    lane, best = lead.lane, lead.lane.best
    group = [seat for seat in active if seat.picture.lane is lane][:best]
    counts = _counts(group)
    if len(counts) == 1:
        return group, lane.step(len(group))
    ms, pays = lane.mixed(list(counts.values()))
    if pays:
        return group, ms
    model = lead.work.model
    group = [seat for seat in active if seat.picture.lane is lane and seat.picture.work.model == model][:best]
    return group, lane.step(len(group))


def _counts(seats: Sequence[Seat]) -> dict[str, int]:
    """Pictures by version."""
    counts: dict[str, int] = {}
    for seat in seats:
        model = seat.picture.work.model
        counts[model] = counts.get(model, 0) + 1
    return counts


def _like(waiting: Sequence[Picture], lane: Lane, group: Sequence[Seat]) -> list[Picture]:
    """What waits and could fill `group` up, in order; one that `joins` may pass others that do not fit."""
    room = lane.best - len(group)
    counts = _counts(group)
    found: list[Picture] = []
    passing = False
    for picture in waiting:
        if picture.lane is lane and (picture.joins or not passing) and _mixes(lane, counts, picture.work.model):
            found.append(picture)
            if len(found) == room:
                break
        else:
            passing = True
    return found


def _mixes(lane: Lane, counts: dict[str, int], model: str) -> bool:
    """Whether a batch with so many pictures of each version should take one more, of `model`; counts it if so."""
    more = counts.get(model, 0) + 1
    if (counts.keys() - {model}) and not lane.mixed(list((counts | {model: more}).values()))[1]:
        return False
    counts[model] = more
    return True


def _harmless(group: Sequence[Seat], found: list[Picture], now_ms: float) -> list[Picture]:
    """As many of `found`, from the first, as may run with `group` so that all firm ones are still done when due.

    A firm one that is late already keeps others out, too; where all that could begin are late, they begin together, or
    the queue would run one by one and get later still.
    """
    if not any(seat.picture.firm for seat in group) and not any(picture.firm for picture in found):
        return found
    if not group and (_in_no_hurry(found, now_ms) or _all_late(found, now_ms)):
        return found
    lane, seats = found[0].lane, [Seat(picture, picture.work.steps) for picture in found]

    def harmless(count: int) -> bool:
        batch = [*group, *seats[:count]]
        counts = _counts(batch)
        step = lane.step(len(batch)) if len(counts) == 1 else lane.mixed(list(counts.values()))[0]
        begun = now_ms + lane.start(count, sum([picture.work.cached for picture in found[:count]]))
        return all(seat.picture.due_ms >= end or not seat.picture.firm for seat, end in _ends(batch, begun, step))

    return found[: max(0 if group else 1, _largest(len(found), harmless))]


def _all_late(pictures: Sequence[Picture], now_ms: float) -> bool:
    """Whether each misses its moment even if it is the next and alone."""
    steps = max([picture.work.steps for picture in pictures])
    return max([picture.due_ms for picture in pictures]) < now_ms + pictures[0].lane.service_ms(1, steps)


def _in_no_hurry(pictures: Sequence[Picture], now_ms: float) -> bool:
    """Whether all are due after even the last is done: what a backlog mostly shows, and cheap to see."""
    steps = max([picture.work.steps for picture in pictures])
    due_ms = min([picture.due_ms for picture in pictures])
    return due_ms >= now_ms + pictures[0].lane.service_ms(len(pictures), steps)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest count up to `most` that `holds`, which the smaller ones do then, too; 0 where none does."""
    if not most or holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _ends(seats: Sequence[Seat], begun_ms: float, step_ms: float) -> list[tuple[Seat, float]]:
    """When each is decoded if they all go on together; that the batch gets smaller towards the end is not counted."""
    lane = seats[0].picture.lane
    ends: list[tuple[Seat, float]] = []
    decoded = begun_ms  # all decoding so far, on top of the evaluations so far
    for left, together in groupby(sorted(seats, key=_left), key=_left):
        ready = list(together)
        decodes = lane.decodes(len(ready))
        for place, seat in enumerate(ready):
            decoded += 0.0 if place % decodes else lane.finish(min(decodes, len(ready) - place))
            ends.append((seat, decoded + left * step_ms))
    return ends


def _left(seat: Seat) -> int:
    return seat.left


def _decode(plan: Plan, now_ms: float) -> Move | None:
    """Decode now, unless more of the shape are about to be ready and waiting for them is better for all together."""
    lane = plan.finishing[0].picture.lane
    ready = [seat for seat in plan.finishing if seat.picture.lane is lane]
    if plan.active and plan.active[0].picture.lane is lane and _better_later(plan, ready, now_ms):
        return None
    count = lane.decodes(len(ready))
    return Move(Stage.FINISH, ready[:count], lane.finish(count))


def _better_later(plan: Plan, ready: Sequence[Seat], now_ms: float) -> bool:
    """Whether one larger decoding saves everybody behind it more than it costs those that are ready."""
    lane, count = ready[0].picture.lane, len(ready)
    if count >= lane.best or lane.decodes(lane.best) == 1:
        return False
    group, ms = _group(plan.active)
    soonest = min([seat.left for seat in group])
    more = sum([seat.left == soonest for seat in group])
    wait = soonest * ms
    together = lane.finish(count + more)
    saved = lane.finish(count) + lane.finish(more) - together
    crowd = len(plan.waiting) + len(plan.active) + len(plan.finishing) - count
    if saved * crowd <= wait * count:
        return False
    return all(now_ms + wait + together <= seat.picture.due_ms for seat in ready)


def _without(seats: Sequence[Seat], leaving: Sequence[Seat]) -> list[Seat]:
    gone = {id(seat) for seat in leaving}
    return [seat for seat in seats if id(seat) not in gone]
