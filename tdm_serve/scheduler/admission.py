"""Whether a ticket can be taken, and where its pictures stand in the queue, so that every earlier promise is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tdm_serve.core import Shape
from tdm_serve.scheduler.fairness import Shares
from tdm_serve.scheduler.forecast import Forecast
from tdm_serve.scheduler.nouns import Policy, Reason
from tdm_serve.scheduler.plan import Picture, Plan

DRIFT = 0.01  # part of a wait by which two forecasts of the same thing may differ


@dataclass(frozen=True, slots=True)
class Place:
    """Where newcomers would stand: the whole queue with them, and what comes of it."""

    queue: list[Picture]
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Miss:
    """Why there is no place, and the ETA there would have been, at least."""

    reason: Reason
    eta_ms: float


class Door:
    """Finds places. `ahead` makes the forecast of another queue, from now."""

    def __init__(self, policy: Policy, shares: Shares, ahead: Callable[[list[Picture], float], Forecast]) -> None:
        self._policy = policy
        self._shares = shares
        self._ahead = ahead

    def find(self, plan: Plan, new: Sequence[Picture], before: Forecast, now_ms: float) -> Place | Miss:
        """A place where the newcomers are in time and break no promise, or by how much they miss.

        Tried in turn: what their key or deadline entitles them to; further back; the end, where they pass nobody; and,
        for the sake of a deadline, ahead of everything. `before` is what comes of the queue without them.
        """
        limits = self._limits(plan, new)
        index = self._index(plan.waiting, new, limits, before)
        found = self._in_line(plan, new, limits, before, index, now_ms)
        if isinstance(found, Place) or found.reason != "deadline" or not self._yielding(plan, new, limits, before):
            return found
        for picture in new:
            picture.urgent = True
        place = self._place(plan.waiting, new, 0, now_ms)
        broken = self._breaks(plan, limits, before, place.forecast)
        return place if not broken and self._miss(new, place.forecast, now_ms) is None else found

    def _in_line(
        self,
        plan: Plan,
        new: Sequence[Picture],
        limits: dict[int, float],
        before: Forecast,
        index: int,
        now_ms: float,
    ) -> Place | Miss:
        """The first place from `index` on that breaks no promise, if it is in time."""
        waiting = plan.waiting
        if (miss := self._hopeless(waiting, new, index, before, now_ms)) is not None:
            return miss
        for behind in sorted({index, (index + len(waiting)) // 2, (index + 3 * len(waiting)) // 4}):
            place = self._place(waiting, new, behind, now_ms)
            if (miss := self._miss(new, place.forecast, now_ms)) is not None:
                if behind == len(waiting):
                    before.misses[_kind(new)] = now_ms + miss.eta_ms
                return miss
            if not self._breaks(plan, limits, before, place.forecast):
                return place
        for picture in new:
            picture.joins = False
        place = self._place(waiting, new, len(waiting), now_ms)
        return self._miss(new, place.forecast, now_ms) or place

    def _limits(self, plan: Plan, new: Sequence[Picture]) -> dict[int, float]:
        """How late each picture may get for the newcomers; what has begun only until it is due."""
        waiting, work = plan.waiting, new[0].work
        limits = {seat.picture.work.id: seat.picture.due_ms for seat in (*plan.active, *plan.finishing)}
        if waiting and (work.deadline_ms is not None or new[0].key < waiting[-1].key):
            allowed = self._shares.limits(waiting, work)
        else:
            allowed = [picture.due_ms for picture in waiting]
        return limits | {picture.work.id: limit for picture, limit in zip(waiting, allowed, strict=True)}

    def _index(
        self, waiting: Sequence[Picture], new: Sequence[Picture], limits: dict[int, float], before: Forecast
    ) -> int:
        """The earliest index that newcomers are entitled to and that delays nobody by more than there is room for.

        A picture is passed by one with a smaller key, and by one whose deadline is before the moment it is due.
        """
        deadline, key = new[0].work.deadline_ms, new[0].key
        share_ms = sum([picture.share_ms for picture in new])
        index = len(waiting)
        while index:
            other = waiting[index - 1]
            entitled = key < other.key or (deadline is not None and deadline < other.due_ms)
            if not entitled or limits[other.work.id] - before.ends[other.work.id] < share_ms:
                break
            index -= 1
        return index

    def _hopeless(
        self, waiting: Sequence[Picture], new: Sequence[Picture], index: int, before: Forecast, now_ms: float
    ) -> Miss | None:
        """What shows without a forecast: those just ahead end too late, or the like of these have missed already."""
        if not index:
            return None
        if index == len(waiting):
            behind_ms = before.misses.get(_kind(new), before.idle_ms)
        else:
            behind_ms = before.ends[waiting[index - 1].work.id]
        return self._judge(new[0], behind_ms - now_ms, now_ms)

    def _place(self, waiting: Sequence[Picture], new: Sequence[Picture], index: int, now_ms: float) -> Place:
        queue = insert(waiting, new, index)
        return Place(queue, self._ahead(queue, now_ms))

    def _miss(self, new: Sequence[Picture], after: Forecast, now_ms: float) -> Miss | None:
        return self._judge(new[0], max([after.ends[picture.work.id] for picture in new]) - now_ms, now_ms)

    def _judge(self, picture: Picture, eta_ms: float, now_ms: float) -> Miss | None:
        """What is wrong with an ETA, if something is."""
        deadline = picture.work.deadline_ms
        if deadline is not None and now_ms + eta_ms * (1 + self._policy.deadline_margin) > deadline:
            return Miss("deadline", eta_ms)
        return Miss("too_slow", eta_ms) if eta_ms > self._policy.max_wait_ms else None

    @staticmethod
    def _yielding(plan: Plan, new: Sequence[Picture], limits: dict[int, float], before: Forecast) -> bool:
        """Whether everybody has room for being passed by the newcomers, or is late anyway."""
        if not (plan.waiting or plan.active):
            return False
        share_ms = sum([picture.share_ms for picture in new])
        room = [limit - before.ends[number] for number, limit in limits.items() if number in before.ends]
        return all(ms >= share_ms or ms < 0 for ms in room)

    @staticmethod
    def _breaks(plan: Plan, limits: dict[int, float], before: Forecast, after: Forecast) -> bool:
        """Whether some picture passes its limit that did not before, or that gets later still, by more than a hair."""
        for picture in (*plan.waiting, *[seat.picture for seat in (*plan.active, *plan.finishing)]):
            number = picture.work.id
            end = after.ends[number]
            if end > limits[number] + picture.leeway_ms and number in before.ends:
                expected = before.ends[number]
                if end > expected + max(picture.leeway_ms, DRIFT * (expected - before.made_ms)):
                    return True
        return False


def _kind(new: Sequence[Picture]) -> tuple[Shape, int, int]:
    return new[0].work.shape, max([picture.work.steps for picture in new]), len(new)


def insert(waiting: Sequence[Picture], new: Sequence[Picture], index: int) -> list[Picture]:
    """The queue with newcomers in it. Their keys move between those of their neighbours, so that keys stay sorted."""
    low = waiting[index - 1].key if index else float("-inf")
    high = waiting[index].key if index < len(waiting) else float("inf")
    for picture in new:
        picture.key = min(max(picture.key, low), high)
    return [*waiting[:index], *new, *waiting[index:]]
