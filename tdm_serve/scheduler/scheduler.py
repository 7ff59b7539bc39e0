"""The queue of one device: what is promised to whom, and what runs next.

Admission keeps its word by running the scheduler's own decisions ahead of time (`forecast`): a ticket is accepted with
the ETA that comes out, if that breaks no earlier promise. Not thread-safe; times are ms of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tdm_serve.scheduler.admission import Door, Place
from tdm_serve.scheduler.calibration import Calibration, Company
from tdm_serve.scheduler.fairness import Shares
from tdm_serve.scheduler.forecast import Forecast, forecast
from tdm_serve.scheduler.lanes import Lanes
from tdm_serve.scheduler.nouns import (
    Costs,
    Idle,
    Outcome,
    Policy,
    Promise,
    Refusal,
    Run,
    Stage,
    Work,
)
from tdm_serve.scheduler.plan import Move, Picture, Plan, decide

DEFAULT = Policy()
PATIENCE = 0.1  # company that costs no more than this part of an ETA may always join, lest a late queue run one by one
LEEWAY = 0.05  # part of an ETA by which newcomers may delay a promise where batches gain much
SAFETY = 0.05  # part by which a wait before another try is longer than predicted
KEPT_OUTCOMES = 1024


@dataclass(slots=True)
class _Ticket:
    """Pictures that are not done yet, and what was promised."""

    left: set[int]
    accepted_ms: float
    promised_ms: float
    forecast_ms: float  # the moment, if nobody had come
    room_ms: float  # what the others of a full batch would have added
    deadline_ms: float | None
    whole: bool = True  # none of its pictures has failed


@dataclass(slots=True)
class _Open:
    """The run that the device is at."""

    run: Run
    move: Move
    since_ms: float


class Scheduler:
    """Offer tickets, ask for the next run, say when it is done."""

    def __init__(self, costs: Costs, policy: Policy = DEFAULT) -> None:
        self.policy = policy
        self.calibration = Calibration()
        self.company = Company()
        self._lanes = Lanes(costs, policy.max_batch, self.calibration.ratios)
        self._shares = Shares(policy)
        self._door = Door(policy, self._shares, self._ahead)
        self.took_ms = 0.0  # by the run that was done last, with the gap before it where the device had no pause
        self._plan = Plan()
        self._open: _Open | None = None
        self._gone: set[int] = set()  # pictures of the open run that were cancelled
        self._tickets: dict[int, _Ticket] = {}
        self._seen: Forecast | None = None  # of the present queue
        self._free_ms: float | None = None  # when the run before ended, while there is something to do
        self._outcomes: list[Outcome] = []

    @property
    def waiting(self) -> int:
        """Pictures that have not begun."""
        return len(self._plan.waiting)

    @property
    def running(self) -> int:
        """Pictures that have begun and are not done, cancelled ones not counted."""
        starting = len(self._open.run.ids) if self._open and self._open.run.stage is Stage.START else 0
        return len(self._plan.active) + len(self._plan.finishing) + starting - len(self._gone)

    def offer(self, works: Sequence[Work], now_ms: float) -> Promise | Refusal:
        """Takes all pictures of a ticket, or none. Raises ValueError for works that are no new ticket."""
        self._check(works)
        if (refusal := self._no_room(works, now_ms)) is not None:
            return refusal
        self._lanes.refresh()
        pictures = [self._picture(work) for work in works]
        self._shares.tag(pictures, self._plan.waiting)
        place = self._door.find(self._plan, pictures, self._recent(now_ms), now_ms)
        if isinstance(place, Place):
            return self._accept(pictures, place, now_ms)
        return Refusal(place.reason, _patient(self._wait_ms(pictures, now_ms, place.eta_ms)))

    def next(self, now_ms: float) -> Run | Idle:
        """What the device does next. Raises RuntimeError while a run is open."""
        if self._open is not None:
            raise RuntimeError(f"The {self._open.run.stage} run is not done; one run is open at a time")
        self._lanes.refresh()
        move = decide(self._plan, now_ms)
        if move is None:
            self._free_ms = None
            return Idle()
        self._plan.take(move)
        if move.stage is Stage.START:
            for seat in move.seats:
                self._shares.began(seat.picture)
        move.repeats = 1
        run = Run(move.stage, tuple([seat.picture.work.id for seat in move.seats]))
        self._open = _Open(run, move, now_ms)
        return run

    def paused(self) -> None:
        """The device does something else before its next run, which is no part of what that takes."""
        self._free_ms = None

    def done(self, run: Run, now_ms: float, failed: Collection[int] = ()) -> tuple[int, ...]:
        """The device has done `run`, but for the pictures that `failed`; returns those that are finished now.

        Raises ValueError for a run that is not the open one.
        """
        opened = self._open
        if opened is None or opened.run != run:
            raise ValueError(f"{run} is not the open run")
        since_ms = opened.since_ms if self._free_ms is None else self._free_ms
        raw_ms = opened.move.ms / self.calibration.ratios[run.stage]
        self.took_ms = now_ms - since_ms
        self.calibration.add(run.stage, raw_ms, self.took_ms)
        self._free_ms = now_ms
        gone = self._gone | set(failed)
        self._plan.put(opened.move, gone)
        self._open, self._gone = None, set()
        lost = [seat.picture for seat in opened.move.seats if seat.picture.work.id in set(failed)]
        for picture in lost:
            self._leave(picture, now_ms, whole=False)
        if run.stage is not Stage.FINISH:
            return ()
        finished = [seat.picture for seat in opened.move.seats if seat.picture.work.id not in gone]
        for picture in finished:
            self._leave(picture, now_ms, whole=True)
        return tuple([picture.work.id for picture in finished])

    def cancel(self, ticket: int) -> tuple[int, ...]:
        """Takes out what is left of a ticket and returns it: nothing where it is done, cancelled or unknown."""
        held = self._tickets.pop(ticket, None)
        if held is None:
            return ()
        in_run = held.left & set(self._open.run.ids) if self._open else set[int]()
        self._gone |= in_run
        self._plan.remove(held.left - in_run)
        self._seen = None
        return tuple(sorted(held.left))

    def overdue(self, now_ms: float) -> tuple[int, ...]:
        """Tickets whose deadline has passed."""
        tickets = self._tickets.items()
        return tuple([name for name, held in tickets if held.deadline_ms is not None and held.deadline_ms < now_ms])

    def position(self, ticket: int) -> int:
        """Pictures ahead of the first of a ticket; 0 where it has begun or is not here."""
        if ticket not in self._tickets:
            return 0
        ids = self._tickets[ticket].left
        mine = [index for index, picture in enumerate(self._plan.waiting) if picture.work.id in ids]
        return self.running + mine[0] if len(mine) == len(ids) else 0

    def eta_ms(self, ticket: int, now_ms: float) -> float:
        """How long until a ticket is done; 0 where it is not here."""
        if ticket not in self._tickets:
            return 0.0
        ends = self._recent(now_ms).ends
        return max(0.0, max(ends[number] for number in self._tickets[ticket].left) - now_ms)

    def backlog_ms(self, now_ms: float) -> float:
        """How long until everything is done."""
        return max(0.0, self._recent(now_ms).idle_ms - now_ms)

    def outcomes(self) -> list[Outcome]:
        """What was promised to tickets and what it took, of those that finished since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _check(self, works: Sequence[Work]) -> None:
        if not works:
            raise ValueError("A ticket of no pictures cannot be offered; it has at least one")
        if works[0].ticket in self._tickets:
            raise ValueError(f"Ticket {works[0].ticket} is here already")
        terms = {(work.ticket, work.tenant, work.priority, work.deadline_ms) for work in works}
        if len(terms) > 1 or len({work.id for work in works}) < len(works):
            raise ValueError("Pictures of a ticket share tenant, priority and deadline, and have ids of their own")
        if min(work.steps for work in works) < 1:
            raise ValueError("A picture of no steps cannot be offered; it takes at least 1")

    def _picture(self, work: Work) -> Picture:
        lane = self._lanes.of(work.shape)
        return Picture(work, lane, share_ms=lane.share_ms(work.steps))

    def _no_room(self, works: Sequence[Work], now_ms: float) -> Refusal | None:
        """A full queue, seen without a new forecast."""
        excess = self.waiting + len(works) - self.policy.max_waiting
        if excess <= 0 or not self.waiting:
            return None
        seen = self._recent(now_ms)
        begins = sorted([seen.begins[picture.work.id] for picture in self._plan.waiting])
        room_ms = begins[min(excess, len(begins)) - 1] - now_ms
        pictures = [self._picture(work) for work in works]
        return Refusal("queue_full", _patient(max(room_ms, self._wait_ms(pictures, now_ms))))

    def _wait_ms(self, pictures: Sequence[Picture], now_ms: float, eta_ms: float = 0.0) -> float:
        """After how long the pictures are sure to be in time, last in the queue; `eta_ms` is too much now.

        What could not be done on an idle device either has to wait until the device is idle, and is refused then.
        """
        work = pictures[0].work
        limit = self.policy.max_wait_ms
        if work.deadline_ms is not None:
            limit = min(limit, (work.deadline_ms - now_ms) / (1 + self.policy.deadline_margin))
        own, backlog = self._own_ms(pictures), self.backlog_ms(now_ms)
        wait = max(backlog, eta_ms) + own - limit if eta_ms > limit else backlog + own - limit
        return max(0.0, min(wait, backlog))

    def _own_ms(self, pictures: Sequence[Picture]) -> float:
        lanes = {picture.lane for picture in pictures}
        total = 0.0
        for lane in lanes:
            mine = [picture.work.steps for picture in pictures if picture.lane is lane]
            total += lane.service_ms(len(mine), max(mine))
        return total

    def _ahead(self, queue: list[Picture], now_ms: float) -> Forecast:
        """What would come of another queue."""
        kept, self._plan.waiting = self._plan.waiting, queue
        try:
            return self._forecast(now_ms)
        finally:
            self._plan.waiting = kept

    def _forecast(self, now_ms: float) -> Forecast:
        if self._open is None:
            return forecast(self._plan, None, 0.0, now_ms)
        left_ms = max(0.0, self._open.since_ms + self._open.move.ms - now_ms)
        return forecast(self._plan, self._open.move, left_ms, now_ms)

    def _recent(self, now_ms: float) -> Forecast:
        """A forecast of the present queue that is not older than `refresh_ms`."""
        if self._seen is None or now_ms - self._seen.made_ms > self.policy.refresh_ms:
            self._seen = self._forecast(now_ms)
        return self._seen

    def _accept(self, pictures: list[Picture], place: Place, now_ms: float) -> Promise:
        work = pictures[0].work
        last = max(pictures, key=lambda picture: place.forecast.ends[picture.work.id])
        end_ms = place.forecast.ends[last.work.id]
        room_ms = last.lane.company_ms(last.work.steps, end_ms - place.forecast.begins[last.work.id])
        worthwhile = last.lane.worthwhile(last.work.steps)
        learned = self.company.part if worthwhile else 0.0
        alone_ms = end_ms - now_ms
        eta_ms = alone_ms + max(learned * room_ms, min(room_ms, self.policy.slack * alone_ms))
        due_ms = now_ms + eta_ms * (1 + self.policy.slack)
        if work.deadline_ms is not None:
            eta_ms, due_ms = min(eta_ms, work.deadline_ms - now_ms), work.deadline_ms
        position = self.running + place.queue.index(pictures[0])
        for picture in pictures:
            picture.due_ms = due_ms
            picture.firm = work.deadline_ms is not None or not (worthwhile or room_ms <= PATIENCE * eta_ms)
            picture.leeway_ms = LEEWAY * eta_ms if worthwhile and work.deadline_ms is None else 0.0
        ids = {picture.work.id for picture in pictures}
        self._tickets[work.ticket] = _Ticket(ids, now_ms, eta_ms, end_ms, room_ms, work.deadline_ms)
        self._plan.waiting = place.queue
        self._seen = place.forecast
        return Promise(eta_ms, position)

    def _leave(self, picture: Picture, now_ms: float, *, whole: bool) -> None:
        """A picture is finished or has failed."""
        held = self._tickets.get(picture.work.ticket)
        if held is None:  # cancelled while its run was open
            return
        held.left.discard(picture.work.id)
        held.whole &= whole
        if not whole:
            self._seen = None
        if held.left:
            return
        del self._tickets[picture.work.ticket]
        if held.whole:
            self.company.add(held.room_ms, now_ms - held.forecast_ms)
            took_ms = now_ms - held.accepted_ms
            self._outcomes = self._outcomes[1 - KEPT_OUTCOMES :]
            self._outcomes.append(Outcome(picture.work.ticket, held.promised_ms, took_ms))


def _patient(wait_ms: float) -> float:
    return max(1.0, wait_ms * (1 + SAFETY))
