"""Tickets: progress, previews, cancelling, deadlines, order, several event loops, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from tdm_serve import AsyncEngine
from tdm_serve.core import Terms
from tdm_serve.errors import (
    Cancelled,
    DeadlinePassed,
    DeadlineUnreachable,
    EngineClosed,
    InvalidRequest,
    Overloaded,
    TdmServeError,
    UnknownModel,
)
from tdm_serve.scheduler import Policy
from tdm_serve.ticket import Ticket
from tests.tdm_serve.toy_device import ToyDevice, asked, is_right

STANDARD = Policy()


class Started(Protocol):
    def __call__(
        self, device: ToyDevice, policy: Policy = ..., max_batch: int = ...
    ) -> AbstractAsyncContextManager[AsyncEngine]: ...


@pytest.fixture
def device() -> ToyDevice:
    return ToyDevice(call_s=0.0005)


@pytest.fixture
def started(tmp_path: Path) -> Started:
    """A warm engine that is closed in the end; no thread and no sample may be left then."""

    @asynccontextmanager
    async def make(device: ToyDevice, policy: Policy = STANDARD, max_batch: int = 4) -> AsyncIterator[AsyncEngine]:
        before = set(threading.enumerate())  # engines of other tests may be running
        engine = AsyncEngine(device, policy=policy, max_batch=max_batch, profile=tmp_path)
        await engine.start()
        device.calls.clear()
        async with asyncio.timeout(60):
            try:
                yield engine
            finally:
                device.gate.set()
                await engine.close()
        assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("tdm-serve")]
        gc.collect()
        assert not list(device.live)

    return make


async def begun_to_run(engine: AsyncEngine) -> None:
    while not engine.stats().running:
        await asyncio.sleep(0.001)


async def nothing_lives(device: ToyDevice) -> None:
    """The device thread tells of a picture before it lets go of its sample, so this may take a moment."""
    async with asyncio.timeout(10):
        while list(device.live):
            await asyncio.sleep(0.001)
            gc.collect()


def test_progress_tells_every_evaluation_of_every_picture(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device) as engine:
            requests = [asked("a star", 1), asked("a ring", 2, steps=2)]
            ticket = engine.submit(requests)
            assert not ticket.done
            assert ticket.eta_ms > 0
            events = [event async for event in ticket.progress()]
            assert sorted((event.index, event.step, event.total) for event in events) == [
                *((0, step, 4) for step in (1, 2, 3, 4)),
                *((1, step, 2) for step in (1, 2)),
            ]
            assert {event.preview for event in events} == {None}
            assert [event async for event in ticket.progress()] == events  # whoever comes late hears it all
            assert all(is_right(*pair) for pair in zip(await ticket.result(), requests, strict=True))
            assert (ticket.done, ticket.eta_ms, ticket.position, ticket.cancel()) == (True, 0.0, 0, False)

    asyncio.run(main())


def test_previews_are_made_in_their_own_thread_and_in_order(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device) as engine:
            ticket = engine.submit([asked(seed=7)], previews=True)
            events = [event async for event in ticket.progress()]
            assert [event.step for event in events] == [1, 2, 3, 4]
            assert [event.preview is not None for event in events] == [True, True, True, False]
            first = events[0].preview
            assert first is not None
            assert first.getpixel((0, 0)) == (7, 0, 0)

    asyncio.run(main())
    [name] = device.preview_threads
    assert name.startswith("tdm-serve preview")
    assert not device.threads & device.preview_threads


def test_callbacks_come_once_in_the_event_loop(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device) as engine:
            told: list[tuple[Ticket, str]] = []

            def tell(ticket: Ticket) -> None:
                told.append((ticket, threading.current_thread().name))

            ticket = engine.submit([asked()])
            ticket.add_done_callback(tell)
            await ticket.result()
            ticket.add_done_callback(tell)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert told == [(ticket, threading.main_thread().name)] * 2

    asyncio.run(main())


def test_cancelling_what_waits_and_what_runs(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device, max_batch=1) as engine:
            device.gate.clear()
            running, waiting = engine.submit([asked("running")]), engine.submit([asked("waiting")])
            await begun_to_run(engine)
            assert waiting.position >= 1
            for ticket in (running, waiting):
                assert ticket.cancel()
                assert not ticket.cancel()
                with pytest.raises(Cancelled):
                    await ticket.result()
                with pytest.raises(Cancelled):
                    async for _ in ticket.progress():
                        pass
            device.gate.set()
            assert is_right((await engine.generate([asked("next")]))[0], asked("next"))
            assert len(device.batches("step", "running")) <= 1  # the evaluation that was under way
            assert not device.batches("start", "waiting")
            stats = engine.stats()
            assert (stats.cancelled, stats.finished, stats.waiting, stats.running) == (2, 1, 0, 0)
            await nothing_lives(device)

    asyncio.run(main())


def test_a_cancelled_caller_cancels_its_pictures(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device) as engine:
            device.gate.clear()
            task = asyncio.create_task(engine.generate([asked("unwanted")]))
            await begun_to_run(engine)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.stats().cancelled == 1
            ticket = engine.submit([asked("wanted")])
            waiting = asyncio.create_task(ticket.result())
            await asyncio.sleep(0)
            waiting.cancel()  # somebody else may still wait for the ticket
            device.gate.set()
            assert is_right((await ticket.result())[0], asked("wanted"))
            assert len(device.batches("step", "unwanted")) <= 1

    asyncio.run(main())


def test_cancel_races_with_the_last_step(started: Started, device: ToyDevice) -> None:
    """Whoever comes first decides, and both sides agree on who that was."""

    async def main() -> None:
        async with started(device) as engine:
            seen = set[bool]()
            for attempt in range(120):
                ticket = engine.submit([asked(seed=attempt, steps=1)])
                await asyncio.sleep(random.Random(attempt).uniform(0, 0.004))
                cancelled = ticket.cancel()
                seen.add(cancelled)
                if cancelled:
                    with pytest.raises(Cancelled):
                        await ticket.result()
                else:
                    assert len(await ticket.result()) == 1
            stats = engine.stats()
            assert stats.cancelled + stats.finished == stats.accepted == 120
            assert seen == {True, False}

    asyncio.run(main())


def test_a_deadline_that_passes_drops_the_pictures(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device) as engine:
            device.gate.clear()
            ticket = engine.submit([asked("late")], Terms(deadline_ms=150))
            other = engine.submit([asked("patient")])
            await begun_to_run(engine)
            threading.Timer(0.2, device.gate.set).start()
            with pytest.raises(DeadlinePassed):
                await ticket.result()
            assert is_right((await other.result())[0], asked("patient"))
            assert len(device.batches("step", "late")) <= 1
            assert engine.stats().failed == {"deadline_passed": 1}

    asyncio.run(main())


def test_what_cannot_be_done_in_time_is_refused_at_once(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device, Policy(max_waiting=3)) as engine:
            with pytest.raises(DeadlineUnreachable) as refused:
                engine.submit([asked()], Terms(deadline_ms=0.01))
            assert refused.value.retry_after_ms > 0
            device.gate.clear()
            tickets = [engine.submit([asked(seed=0)])]
            await begun_to_run(engine)
            with pytest.raises(Overloaded, match="full") as full:
                tickets += [engine.submit([asked(seed=seed)]) for seed in range(1, 9)]
            assert full.value.retry_after_ms > 0
            for request in (asked(""), asked(model="nonsense")):
                with pytest.raises((InvalidRequest, UnknownModel)):
                    engine.submit([request])
            with pytest.raises(UnknownModel, match="'toy', 'toy-long'"):
                engine.check(asked(model="nonsense"))
            with pytest.raises(InvalidRequest):
                engine.submit([])
            assert engine.stats().refused == {"deadline": 1, "queue_full": 1, "invalid": 3}
            device.gate.set()
            for ticket in tickets:
                await ticket.result()

    asyncio.run(main())


def test_priority_and_fair_shares_decide_what_waits(started: Started, device: ToyDevice) -> None:
    device.call_s = 0.003  # long enough for all to be submitted before the first is done

    async def main() -> None:
        async with started(device, Policy(slack=3.0), max_batch=1) as engine:
            ends: list[str] = []

            def submit(name: str, tenant: str, priority: int = 0) -> Ticket:
                ticket = engine.submit([asked(name)], Terms(tenant=tenant, priority=priority))
                ticket.add_done_callback(lambda _: ends.append(name))
                return ticket

            tickets = [submit("first", "greedy")]
            await begun_to_run(engine)
            tickets += [submit(f"greedy {number}", "greedy") for number in range(8)]
            tickets += [submit("modest", "modest"), submit("urgent", "greedy", priority=10)]
            for ticket in tickets:
                await ticket.result()
            await asyncio.sleep(0)
            assert ends[0] == "first"
            assert ends.index("urgent") < 4
            assert ends.index("modest") < 8

    asyncio.run(main())


def test_the_model_of_a_request_decides_its_steps(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device) as engine:
            images = await engine.generate([asked(model="toy"), asked(model="toy-long"), asked()])
            assert [(image.model, image.nfe) for image in images] == [("toy", 4), ("toy-long", 6), ("toy", 4)]
            stats = engine.stats()
            assert stats.evaluations == {"toy": 8, "toy-long": 6}
            assert stats.images == {"toy": 2, "toy-long": 1}
            assert sum(size * count for size, count in stats.batch_fill.items()) == 14
            assert stats.steps == sum(stats.batch_fill.values())
            assert sum(stats.stage_seconds["denoise"].counts) == stats.steps
            assert sum(stats.eta_error.counts) == 1
            assert stats.cache_misses == 1  # the prompts of the warm-up do not count

    asyncio.run(main())


def test_closing_finishes_what_was_accepted_and_may_be_repeated(started: Started, device: ToyDevice) -> None:
    async def main() -> None:
        async with started(device, max_batch=1) as engine:
            tickets = [engine.submit([asked(seed=seed)], previews=bool(seed % 2)) for seed in range(6)]
            closing = [asyncio.create_task(engine.close()) for _ in range(3)]
            await asyncio.sleep(0)
            assert not engine.ready
            with pytest.raises(EngineClosed):
                engine.submit([asked()])
            await asyncio.gather(*closing)
            await engine.close()
            for seed, ticket in enumerate(tickets):
                assert is_right((await ticket.result())[0], asked(seed=seed))

    asyncio.run(main())


def test_closing_before_and_in_the_middle_of_the_start(device: ToyDevice, tmp_path: Path) -> None:
    device.call_s = 0.02

    async def main() -> None:
        never = AsyncEngine(device, profile=tmp_path)
        waiting = never.submit([asked()])
        await never.close()
        with pytest.raises(EngineClosed):
            await waiting.result()
        engine = AsyncEngine(device, profile=tmp_path)
        waiting = engine.submit([asked()])
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await engine.close()
        assert time.monotonic() - began < 1
        with pytest.raises(EngineClosed):
            await start
        assert is_right((await waiting.result())[0], asked())
        assert not list(tmp_path.iterdir())  # half a profile is none
        with pytest.raises(RuntimeError, match="once"):
            await engine.start()

    asyncio.run(main())


def test_two_event_loops_share_an_engine(started: Started, device: ToyDevice) -> None:
    async def ask(engine: AsyncEngine, name: str) -> None:
        for seed in range(10):
            ticket = engine.submit([asked(name, seed)], previews=True)
            assert [event.step async for event in ticket.progress()] == [1, 2, 3, 4]
            assert is_right((await ticket.result())[0], asked(name, seed))

    async def main() -> None:
        async with started(device) as engine:
            await asyncio.gather(
                ask(engine, "here"), *(asyncio.to_thread(asyncio.run, ask(engine, f"there {n}")) for n in range(2))
            )

    asyncio.run(main())


@pytest.mark.parametrize("previews", [False, True])
def test_a_closed_event_loop_calls_its_pictures_off(started: Started, device: ToyDevice, previews: bool) -> None:
    async def ask(engine: AsyncEngine) -> None:
        for seed in range(5):
            engine.submit([asked("lost", seed)], previews=previews)
        await begun_to_run(engine)

    async def main() -> None:
        async with started(device, max_batch=1) as engine:
            device.gate.clear()
            await asyncio.to_thread(asyncio.run, ask(engine))  # and the loop is closed
            device.gate.set()
            while engine.stats().waiting or engine.stats().running:
                await asyncio.sleep(0.001)
            stats = engine.stats()
            assert stats.cancelled + stats.finished == 5
            assert stats.cancelled
            assert is_right((await engine.generate([asked()]))[0], asked())

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_random_submissions_and_cancellations_leave_nothing(started: Started, device: ToyDevice, seed: int) -> None:
    """500 operations of three event loops over mixed sizes, models, steps, deadlines, tenants and faults."""

    async def play(engine: AsyncEngine, number: int, operations: int) -> None:
        dice = random.Random(100 * seed + number)
        tickets: list[tuple[Ticket, list]] = []
        for _ in range(operations):
            await asyncio.sleep(dice.choice((0, 0, 0.001)))
            if tickets and dice.random() < 0.35:
                dice.choice(tickets)[0].cancel()
                continue
            requests = [
                asked(
                    dice.choice(("a star", "a ring", "bad step", "nan", "a very long prompt about a star and a ring")),
                    dice.randrange(200),
                    width=dice.choice((32, 64)),
                    model=dice.choice(("", "toy-long")),
                    steps=dice.choice((None, 1, 3)),
                )
                for _ in range(dice.choice((1, 1, 3)))
            ]
            deadline = dice.choice((None, None, None, 20.0))
            terms = Terms(deadline, priority=dice.randint(-2, 2), tenant=dice.choice("abc"))
            try:
                tickets.append((engine.submit(requests, terms, previews=dice.random() < 0.3), requests))
            except Overloaded:
                continue
        for ticket, requests in tickets:
            try:
                images = await ticket.result()
            except TdmServeError:
                continue
            assert all(is_right(*pair) for pair in zip(images, requests, strict=True))

    async def main() -> None:
        async with started(device, Policy(max_waiting=40)) as engine:
            await asyncio.gather(
                play(engine, 0, 200), *(asyncio.to_thread(asyncio.run, play(engine, n, 150)) for n in (1, 2))
            )
            stats = engine.stats()
            assert (stats.waiting, stats.running, stats.restarts) == (0, 0, 0)
            assert stats.accepted == stats.finished + stats.cancelled + sum(stats.failed.values())
            assert stats.finished and stats.cancelled and stats.failed

    asyncio.run(main())


def test_a_signal_in_the_middle_of_a_submission_leaves_nothing_behind(started: Started, device: ToyDevice) -> None:
    class Signal(BaseException):
        """What a handler raises, wherever the program is."""

    async def main() -> None:
        async with started(device) as engine:
            scheduler = engine._desk._scheduler
            offer = scheduler.offer

            def interrupted(*arguments: Any) -> None:
                offer(*arguments)
                raise Signal

            scheduler.offer = interrupted  # pyright: ignore[reportAttributeAccessIssue]
            with pytest.raises(Signal):
                engine.submit([asked("half")])
            scheduler.offer = offer
            assert is_right((await engine.generate([asked()]))[0], asked())
            assert not device.batches("start", "half")
            assert (engine.stats().accepted, engine.stats().waiting, engine.stats().restarts) == (1, 0, 0)

    asyncio.run(main())
