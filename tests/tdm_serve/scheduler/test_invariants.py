"""Whatever comes in whatever order: no picture is lost or doubled, and forecasts are what happens if nobody comes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tdm_serve.core import Shape
from tdm_serve.profile import Device, Profile
from tdm_serve.scheduler import Idle, Policy, Promise, Refusal, Run, Scheduler, Stage, Work

SHAPES = (Shape(64, 64, 16), Shape(128, 128, 16))


def profile(slope: float) -> Profile:
    """Batches cost `slope` of what single pictures do."""
    made = Profile(Device("device", 1, "float32", "eager", "hash"))
    for batch in (1, 2, 4):
        made.observe(Stage.START, SHAPES[0], batch, 2.0 * batch)
        made.observe(Stage.STEP, SHAPES[0], batch, 10.0 * (1 + slope * (batch - 1)))
        made.observe(Stage.FINISH, SHAPES[0], batch, 8.0 * (1 + slope * (batch - 1)))
    made.observe(Stage.STEP, SHAPES[0], 2, 11.0, models=2)
    return made


class Queue(RuleBasedStateMachine):
    """Offers, runs, cancels and fails at random; the model is which pictures are in, out and how they ended."""

    @initialize(slope=st.sampled_from([0.1, 0.6, 1.0]))
    def start(self, slope: float) -> None:
        self.scheduler = Scheduler(profile(slope), Policy(max_waiting=12, max_wait_ms=2000.0))
        self.now = 0.0
        self.works: dict[int, Work] = {}  # accepted and not ended
        self.ended: set[int] = set()
        self.run: Run | None = None
        self.number = 0

    @rule(
        count=st.integers(1, 4),
        shape=st.sampled_from(SHAPES),
        steps=st.integers(1, 6),
        model=st.sampled_from("ab"),
        deadline=st.none() | st.floats(1.0, 1500.0),
        priority=st.integers(-10, 10),
        tenant=st.sampled_from(["x", "y", "z"]),
        cached=st.booleans(),
    )
    def offer(
        self,
        count: int,
        shape: Shape,
        steps: int,
        model: str,
        deadline: float | None,
        priority: int,
        tenant: str,
        cached: bool,
    ) -> None:
        at_ms = None if deadline is None else self.now + deadline
        ids = range(self.number, self.number + count)
        self.number += count
        ticket = ids[0]
        works = [Work(i, ticket, shape, model, steps, self.now, at_ms, priority, tenant, cached) for i in ids]
        answer = self.scheduler.offer(works, self.now)
        if isinstance(answer, Refusal):
            assert answer.retry_after_ms > 0
            return
        assert answer.eta_ms > 0 and answer.position >= 0
        assert deadline is None or answer.eta_ms <= deadline
        self.works |= {work.id: work for work in works}

    @precondition(lambda self: self.run is None)
    @rule()
    def begin(self) -> None:
        run = self.scheduler.next(self.now)
        if isinstance(run, Idle):
            assert not self.works
            return
        self.run = run
        assert set(run.ids) <= set(self.works) and len(set(run.ids)) == len(run.ids) > 0
        assert len({self.works[number].shape for number in run.ids}) == 1

    @precondition(lambda self: self.run is not None)
    @rule(took=st.floats(0.5, 60.0), fails=st.lists(st.booleans(), min_size=4, max_size=4))
    def finish(self, took: float, fails: list[bool]) -> None:
        assert self.run is not None
        self.now += took
        failed = {number for number, fail in zip(self.run.ids, fails, strict=False) if fail and number in self.works}
        finished = self.scheduler.done(self.run, self.now, failed)
        assert set(finished) <= set(self.run.ids) - failed and (not finished or self.run.stage is Stage.FINISH)
        expected = {number for number in self.run.ids if number in self.works} - failed
        assert self.run.stage is not Stage.FINISH or set(finished) == expected
        self._end(set(finished) | failed)
        self.run = None

    @rule(choice=st.integers(0, 1000))
    def cancel(self, choice: int) -> None:
        tickets = sorted({work.ticket for work in self.works.values()})
        if not tickets:
            return
        ticket = tickets[choice % len(tickets)]
        gone = self.scheduler.cancel(ticket)
        assert set(gone) == {work.id for work in self.works.values() if work.ticket == ticket}
        self._end(set(gone))
        assert self.scheduler.cancel(ticket) == ()

    def _end(self, ids: set[int]) -> None:
        assert not ids & self.ended
        self.ended |= ids
        for number in ids:
            del self.works[number]

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.waiting + self.scheduler.running == len(self.works)
            late = {work.ticket for work in self.works.values() if work.deadline_ms and work.deadline_ms < self.now}
            assert set(self.scheduler.overdue(self.now)) == late

    def teardown(self) -> None:
        """Everything that is still there ends."""
        for _ in range(2000):
            if self.run is not None:
                self.finish(5.0, [False] * 4)
            self.begin()
            if self.run is None:
                break
        assert not self.works and self.scheduler.waiting == self.scheduler.running == 0


Queue.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueue = Queue.TestCase


def test_a_forecast_is_what_happens_if_nobody_comes() -> None:
    costs = profile(0.3)
    scheduler, now = Scheduler(costs), 0.0
    promises: dict[int, float] = {}
    for number in range(20):
        works = [Work(number, number, SHAPES[number % 2], "a", 1 + number % 5, now, priority=number % 3)]
        assert isinstance(scheduler.offer(works, now), Promise)
    ends = {number: scheduler.eta_ms(number, 0.0) for number in range(20)}
    while isinstance(run := scheduler.next(now), Run):
        shape, count = SHAPES[run.ids[0] % 2], len(run.ids)
        if run.stage is Stage.START:
            now += costs.start_ms(shape, count, 0)
        else:
            now += costs.step_ms(shape, count) if run.stage is Stage.STEP else costs.finish_ms(shape, count)
        promises |= dict.fromkeys(scheduler.done(run, now), now)
    for number, end in ends.items():
        assert promises[number] <= 1.03 * end + 1  # grace may join somebody earlier than forecast
