"""What runs next: order, batches, joins, mixed versions, cancelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdm_serve.core import Shape
from tdm_serve.errors import ConfigError
from tdm_serve.profile import Profile
from tdm_serve.scheduler import Idle, Policy, Promise, Refusal, Run, Scheduler, Stage, Work
from tdm_serve.scheduler.calibration import CAUTION

Make = Callable[..., Work]


def cost(costs: Profile, run: Run, shape: Shape) -> float:
    count = len(run.ids)
    if run.stage is Stage.START:
        return costs.start_ms(shape, count, 0)
    return costs.step_ms(shape, count) if run.stage is Stage.STEP else costs.finish_ms(shape, count)


def drain(scheduler: Scheduler, costs: Profile, shape: Shape, now: float = 0.0) -> list[Run]:
    """All runs until nothing is left."""
    runs: list[Run] = []
    while isinstance(run := scheduler.next(now), Run):
        runs.append(run)
        now += cost(costs, run, shape)
        scheduler.done(run, now)
    return runs


def order(runs: list[Run]) -> list[int]:
    return [number for run in runs if run.stage is Stage.FINISH for number in run.ids]


def accept(scheduler: Scheduler, works: list[Work], now: float = 0.0) -> Promise:
    answer = scheduler.offer(works, now)
    assert isinstance(answer, Promise), answer
    return answer


def test_one_picture_goes_through_its_stages(cpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(cpu)
    assert scheduler.next(0.0) == Idle()
    promise = accept(scheduler, [work()])
    assert promise.eta_ms == pytest.approx(CAUTION * cpu.alone_ms(small), rel=0.09) and promise.position == 0
    stages = [run.stage for run in drain(scheduler, cpu, small)]
    assert stages == [Stage.START, *[Stage.STEP] * 4, Stage.FINISH]
    assert scheduler.next(1000.0) == Idle() and scheduler.waiting == scheduler.running == 0
    assert scheduler.outcomes()[0].actual_ms == pytest.approx(cpu.alone_ms(small)) and not scheduler.outcomes()


def test_what_the_device_does_between_runs_is_no_part_of_them(cpu: Profile, work: Make) -> None:
    scheduler = Scheduler(cpu)
    accept(scheduler, [work()])

    def took_ms(begun: float, done: float) -> float:
        run = scheduler.next(begun)
        assert isinstance(run, Run)
        scheduler.done(run, done)
        return scheduler.took_ms

    assert took_ms(0.0, 10.0) == 10.0
    assert took_ms(12.0, 20.0) == 10.0  # with the gap before it
    scheduler.paused()
    assert took_ms(500.0, 510.0) == 10.0


def test_equals_are_served_in_order_of_arrival_and_in_measured_batches(
    cpu: Profile, gpu: Profile, small: Shape, work: Make
) -> None:
    for costs, best in ((cpu, 2), (gpu, 16)):
        scheduler = Scheduler(costs)
        works = [work(ticket=0) for _ in range(32)]
        accept(scheduler, works)
        runs = drain(scheduler, costs, small)
        assert order(runs) == [each.id for each in works]
        assert {len(run.ids) for run in runs if run.stage is Stage.STEP} == {best}
        assert costs.best_batch(small) == best


def test_a_backlog_of_single_pictures_fills_batches_too(cpu: Profile, gpu: Profile, small: Shape, work: Make) -> None:
    for costs, best in ((cpu, 2), (gpu, 16)):
        scheduler = Scheduler(costs)
        works = [work() for _ in range(96)]
        for each in works:
            accept(scheduler, [each])
        runs = drain(scheduler, costs, small)
        assert order(runs) == [each.id for each in works]
        sizes = [len(run.ids) for run in runs if run.stage is Stage.STEP]
        assert sum(sizes) / len(sizes) >= 0.8 * best  # the first were promised more than a full batch allows


def test_the_cap_of_the_policy_holds(gpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(gpu, Policy(max_batch=3))
    accept(scheduler, [work(ticket=0) for _ in range(9)])
    assert max(len(run.ids) for run in drain(scheduler, gpu, small)) == 3


def test_pictures_are_decoded_one_by_one_where_batches_of_them_gain_nothing(
    cpu: Profile, small: Shape, work: Make
) -> None:
    scheduler = Scheduler(cpu)
    accept(scheduler, [work(ticket=0), work(ticket=0)])
    assert [len(run.ids) for run in drain(scheduler, cpu, small) if run.stage is Stage.FINISH] == [1, 1]


def test_runs_never_mix_shapes(gpu: Profile, small: Shape, large: Shape, work: Make) -> None:
    scheduler = Scheduler(gpu)
    works = [work(large if index % 2 else small) for index in range(12)]
    for each in works:
        accept(scheduler, [each])
    shapes = {each.id: each.shape for each in works}
    runs = drain(scheduler, gpu, small)
    assert all(len({shapes[number] for number in run.ids}) == 1 for run in runs)
    assert sorted(order(runs)) == [each.id for each in works]


def test_the_earliest_deadline_goes_first(cpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(cpu, Policy(max_batch=1))
    works = [work(deadline_ms=deadline) for deadline in (5000.0, 4000.0, 900.0, 2000.0)]
    for each in works:
        accept(scheduler, [each])
    assert order(drain(scheduler, cpu, small)) == [works[index].id for index in (2, 3, 1, 0)]


def test_an_urgent_deadline_passes_what_has_begun(cpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(cpu)
    long, urgent = work(steps=200), work(deadline_ms=100.0)
    promise = accept(scheduler, [long])
    run = scheduler.next(0.0)
    assert isinstance(run, Run)
    scheduler.done(run, 6.0)
    accept(scheduler, [urgent], 6.0)
    runs = drain(scheduler, cpu, small, 6.0)
    assert order(runs) == [urgent.id, long.id] and promise.eta_ms > 1000


def test_priority_goes_first_within_what_aging_allows(cpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(cpu, Policy(max_batch=1))
    plain = [work() for _ in range(5)]
    for each in plain:
        accept(scheduler, [each])
    high = work(priority=10)
    assert accept(scheduler, [high]).position == 0
    assert order(drain(scheduler, cpu, small)) == [high.id, *[each.id for each in plain]]


def test_low_priority_comes_up_with_time(cpu: Profile, work: Make, small: Shape) -> None:
    policy = Policy(max_batch=1, aging_ms=50.0, max_wait_ms=1e9)
    scheduler, now = Scheduler(cpu, policy), 0.0
    low = work(priority=0)
    accept(scheduler, [work(priority=10)])
    accept(scheduler, [low])
    for _ in range(60):  # high priority keeps coming as fast as it is served
        run = scheduler.next(now)
        assert isinstance(run, Run)
        now += cost(cpu, run, small)
        if low.id in scheduler.done(run, now):
            break
        if scheduler.waiting < 3:
            accept(scheduler, [work(priority=10, at_ms=now)], now)
    else:
        pytest.fail("the low one starves")
    assert now < 10 * 50.0 + 5 * cpu.alone_ms(small)


def test_one_request_passes_a_hundred_of_another_tenant(cpu: Profile, work: Make) -> None:
    scheduler = Scheduler(cpu)
    for _ in range(100):
        accept(scheduler, [work(tenant="many")])
    last = scheduler.eta_ms(99, 0.0)
    promise = accept(scheduler, [work(tenant="one")])
    assert promise.position < 20 and promise.eta_ms < 0.2 * last
    assert scheduler.eta_ms(99, 0.0) < 1.1 * last  # and the many hardly notice


def test_weights_are_shares(cpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(cpu, Policy(max_batch=1, weights={"heavy": 3.0}, fair_share=10.0, slack=10.0))
    for _ in range(30):
        accept(scheduler, [work(tenant="light")])
    heavy = [work(tenant="heavy") for _ in range(30)]
    for each in heavy:
        accept(scheduler, [each])
    first = order(drain(scheduler, cpu, small))[:20]
    assert 13 <= len(set(first) & {each.id for each in heavy}) <= 17


@pytest.mark.parametrize(("mixed_ms", "together"), [(12.0, True), (14.7, True), (14.9, False)])
def test_versions_share_a_batch_only_where_that_is_cheaper(
    cpu: Profile, small: Shape, work: Make, mixed_ms: float, together: bool
) -> None:
    cpu.observe(Stage.STEP, small, 2, mixed_ms, models=2)  # two alone: 14.8
    scheduler = Scheduler(cpu)
    accept(scheduler, [work(ticket=0, model="a"), work(ticket=0, model="b")])
    runs = drain(scheduler, cpu, small)
    assert {len(run.ids) for run in runs if run.stage is Stage.STEP} == ({2} if together else {1})


def test_unmeasured_mixes_are_not_made(gpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(gpu)
    works = [work(ticket=0, model=str(index % 2)) for index in range(8)]
    accept(scheduler, works)
    models = {each.id: each.model for each in works}
    runs = drain(scheduler, gpu, small)
    assert all(len({models[number] for number in run.ids}) == 1 for run in runs if run.stage is Stage.STEP)


def test_an_arrival_joins_running_work_where_it_breaks_no_promise(
    cpu: Profile, gpu: Profile, small: Shape, work: Make
) -> None:
    for costs, joins in ((gpu, True), (cpu, False)):
        scheduler = Scheduler(costs, Policy(slack=0.05))
        accept(scheduler, [work(steps=4)])
        now = 0.0
        for _ in range(2):
            run = scheduler.next(now)
            assert isinstance(run, Run)
            now += cost(costs, run, small)
            scheduler.done(run, now)
        accept(scheduler, [work(steps=4)], now)
        runs = drain(scheduler, costs, small, now)
        assert (max(len(run.ids) for run in runs if run.stage is Stage.STEP) == 2) is joins


def test_steps_may_differ_within_a_batch_and_freed_slots_are_filled(gpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(gpu, Policy(max_batch=2))
    long, short, late = work(steps=8, ticket=7), work(steps=2, ticket=7), work(steps=6, ticket=7)
    accept(scheduler, [long, short, late])
    steps = [run.ids for run in drain(scheduler, gpu, small) if run.stage is Stage.STEP]
    assert steps == [(long.id, short.id)] * 2 + [(long.id, late.id)] * 6


def test_cancelling_what_waits_and_what_runs(cpu: Profile, work: Make) -> None:
    scheduler = Scheduler(cpu)
    first, second = work(), work()
    accept(scheduler, [first])
    run = scheduler.next(0.0)
    assert isinstance(run, Run)
    accept(scheduler, [second])
    assert scheduler.cancel(second.ticket) == (second.id,) and scheduler.waiting == 0
    assert scheduler.cancel(second.ticket) == () == scheduler.cancel(12345)
    assert scheduler.cancel(first.ticket) == (first.id,) and scheduler.running == 0
    assert scheduler.done(run, 6.0) == () and scheduler.next(6.0) == Idle()


def test_cancelling_in_the_last_run_wins_the_race(cpu: Profile, work: Make) -> None:
    scheduler, now = Scheduler(cpu), 0.0
    works = [work(), work()]
    accept(scheduler, works[:1])
    while isinstance(run := scheduler.next(now), Run):
        now += 10.0
        if run.stage is Stage.FINISH:
            assert scheduler.cancel(works[0].ticket) == (works[0].id,)
            assert scheduler.done(run, now) == ()
        else:
            assert scheduler.done(run, now) == ()
    assert not scheduler.outcomes()


def test_cancelled_pictures_do_not_spoil_their_mates(gpu: Profile, small: Shape, work: Make) -> None:
    for stage in Stage:
        scheduler, now, finished = Scheduler(gpu), 0.0, []
        kept, dropped = work(), work()
        accept(scheduler, [kept])
        accept(scheduler, [dropped])
        cancelled = False
        while isinstance(run := scheduler.next(now), Run):
            if run.stage is stage and not cancelled:
                cancelled = scheduler.cancel(dropped.ticket) == (dropped.id,)
            now += cost(gpu, run, small)
            finished += scheduler.done(run, now)
        assert finished == [kept.id]


def test_failed_pictures_leave_and_others_go_on(gpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(gpu)
    good, bad = work(ticket=1), work(ticket=1)
    accept(scheduler, [good, bad])
    run = scheduler.next(0.0)
    assert isinstance(run, Run)
    scheduler.done(run, 5.0, failed=[bad.id])
    assert order(drain(scheduler, gpu, small, 5.0)) == [good.id]
    assert not scheduler.outcomes()  # a ticket that lost a picture kept no promise


def test_one_run_is_open_at_a_time(cpu: Profile, work: Make) -> None:
    scheduler = Scheduler(cpu)
    accept(scheduler, [work()])
    run = scheduler.next(0.0)
    assert isinstance(run, Run)
    with pytest.raises(RuntimeError, match="one run is open"):
        scheduler.next(1.0)
    scheduler.done(run, 6.0)
    with pytest.raises(ValueError, match="not the open run"):
        scheduler.done(run, 7.0)


def test_what_is_no_ticket_is_not_offered(cpu: Profile, work: Make) -> None:
    scheduler = Scheduler(cpu)
    accept(scheduler, [work(ticket=5)])
    for works in ([], [work(ticket=5)], [work(ticket=6, tenant="a"), work(ticket=6, tenant="b")], [work(steps=0)]):
        with pytest.raises(ValueError, match=r"icket|steps"):
            scheduler.offer(works, 0.0)
    assert scheduler.waiting == 1


@pytest.mark.parametrize(
    "terms", [{"max_waiting": 0}, {"max_wait_ms": 0.0}, {"slack": -0.1}, {"weights": {"a": 0.0}}, {"max_batch": 0}]
)
def test_a_policy_without_sense_is_refused(terms: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Policy(**terms)  # type: ignore[arg-type]


def test_refusals_name_the_reason(cpu: Profile, small: Shape, work: Make) -> None:
    scheduler = Scheduler(cpu, Policy(max_waiting=4, max_wait_ms=300.0))
    assert scheduler.offer([work(deadline_ms=50.0)], 0.0) == Refusal("deadline", 1.0)  # alone it takes 60
    answers = [scheduler.offer([work()], 0.0) for _ in range(5)]
    assert isinstance(answers[-1], Refusal) and answers[-1].reason == "queue_full"
    slow = Scheduler(cpu, Policy(max_wait_ms=300.0))
    answers = [slow.offer([work()], 0.0) for _ in range(10)]
    refusals = [answer for answer in answers if isinstance(answer, Refusal)]
    assert refusals and {refusal.reason for refusal in refusals} == {"too_slow"}
    assert slow.overdue(1e9) == () and slow.backlog_ms(0.0) > 200


def test_overdue_tickets_are_named_until_they_are_cancelled(cpu: Profile, work: Make) -> None:
    scheduler = Scheduler(cpu)
    late = work(deadline_ms=500.0)
    accept(scheduler, [late])
    accept(scheduler, [work()])
    assert scheduler.overdue(500.0) == () and scheduler.overdue(500.1) == (late.ticket,)
    scheduler.cancel(late.ticket)
    assert scheduler.overdue(501.0) == ()
