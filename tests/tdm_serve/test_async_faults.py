"""Faults in every stage: who fails, who does not, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tdm_serve import AsyncEngine, GeneratedImage, Request
from tdm_serve.core import Shape
from tdm_serve.errors import EngineClosed, EngineFailed, OutOfDeviceMemory, PictureFailed, TdmServeError
from tdm_serve.profile import Device as Identity
from tdm_serve.profile import Profile
from tdm_serve.scheduler import Policy, Stage
from tdm_serve.ticket import Ticket
from tests.tdm_serve.toy_device import BAD, NAN, ToyDevice, asked, is_right

SHAPE = Shape(64, 64, 32)
STAGES = ["start", "step", "finish"]
Run = Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any]


class Steady(Profile):
    """Batches of four are the best, whatever the machine that the tests run on is busy with."""

    def __init__(self, device: Identity) -> None:
        super().__init__(device)
        for stage, batch in product(Stage, (1, 2, 4)):
            super().observe(stage, SHAPE, batch, 1.0)

    def observe(self, stage: Stage, shape: Shape, batch: int, ms: float, models: int = 1) -> None:
        """Learns nothing."""


@pytest.fixture
def device() -> ToyDevice:
    return ToyDevice(call_s=0.0005)


@pytest.fixture
def run(device: ToyDevice, tmp_path: Path) -> Run:
    """Runs a scene with a started engine of batches up to 4, and checks that nothing is left of it."""

    async def scene(play: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
        engine = AsyncEngine(device, policy=Policy(slack=10.0), max_batch=4, profile=tmp_path)
        await engine.start()
        engine._desk.profiled(Steady(engine._identity))
        device.calls.clear()
        try:
            return await play(engine)
        finally:
            device.gate.set()
            await engine.close()

    def play(what: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
        before = set(threading.enumerate())  # engines of other tests may be running
        result = asyncio.run(scene(what))
        assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("tdm-serve")]
        gc.collect()
        assert not list(device.live)
        return result

    return play


async def ends(tickets: list[Ticket]) -> list[list[GeneratedImage] | BaseException]:
    async with asyncio.timeout(20):
        return await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)


def together(engine: AsyncEngine, device: ToyDevice, requests: list[Request]) -> list[Ticket]:
    """Tickets of one picture each that share their batches: they wait while a first one is held in its step."""
    device.gate.clear()
    tickets = [engine.submit([request]) for request in requests]
    threading.Timer(0.05, device.gate.set).start()
    return tickets


@pytest.mark.parametrize("poison", [*BAD.values(), NAN])
def test_a_poisoned_picture_fails_alone(run: Run, device: ToyDevice, poison: str) -> None:
    async def play(engine: AsyncEngine) -> None:
        requests = [asked("a first star"), *(asked("a star", seed) for seed in range(3)), asked(poison)]
        outcomes = await ends(together(engine, device, requests))
        assert isinstance(outcomes[-1], PictureFailed)
        for request, outcome in zip(requests[:-1], outcomes, strict=False):
            assert isinstance(outcome, list)
            assert is_right(outcome[0], request)
        assert engine.degraded is None
        assert engine.stats().failed == {"picture_failed": 1}
        assert max(device.batches("step", "a star")) > 1

    run(play)


@pytest.mark.parametrize("poison", [*BAD.values(), NAN])
def test_poisoned_pictures_one_after_the_other_leave_the_engine_alive(run: Run, poison: str) -> None:
    async def play(engine: AsyncEngine) -> None:
        for seed in range(5):
            with pytest.raises(PictureFailed):
                await engine.generate([asked(poison, seed)])
        assert engine.ready and engine.degraded is None
        assert is_right((await engine.generate([asked()]))[0], asked())

    run(play)


def test_one_bad_picture_fails_its_ticket_and_frees_the_rest_of_it(run: Run, device: ToyDevice) -> None:
    async def play(engine: AsyncEngine) -> None:
        other = engine.submit([asked("another star")])
        with pytest.raises(PictureFailed):
            await engine.generate([asked(), asked(BAD["start"]), *(asked(seed=seed) for seed in range(6))])
        assert is_right((await other.result())[0], asked("another star"))
        stats = engine.stats()
        assert (stats.waiting, stats.running) == (0, 0)

    run(play)


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_halves_the_batch(run: Run, device: ToyDevice, stage: str) -> None:
    device.call_s = 0.002  # so that batches pay, and pictures join

    async def play(engine: AsyncEngine) -> None:
        device.fits[stage] = 2
        requests = [asked("a star", seed) for seed in range(6)]
        outcomes = await ends(together(engine, device, requests))
        for request, outcome in zip(requests, outcomes, strict=True):
            assert isinstance(outcome, list)
            assert is_right(outcome[0], request)
        assert max(device.batches(stage, "a star")) > 2
        assert not engine.stats().failed

    run(play)


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_twice_fails_those_pictures_and_no_more(run: Run, device: ToyDevice, stage: str) -> None:
    async def play(engine: AsyncEngine) -> None:
        device.fits[stage] = 0
        outcomes = await ends(together(engine, device, [asked("a star", seed) for seed in range(3)]))
        assert [type(outcome) for outcome in outcomes] == [OutOfDeviceMemory] * 3
        assert device.emptied >= 2
        del device.fits[stage]
        assert is_right((await engine.generate([asked()]))[0], asked())
        assert engine.degraded is None

    run(play)


def test_a_batch_that_was_too_large_is_not_tried_again(run: Run, device: ToyDevice) -> None:
    async def play(engine: AsyncEngine) -> None:
        device.fits["step"] = 2
        await ends(together(engine, device, [asked("a star", seed) for seed in range(8)]))
        device.calls.clear()
        await ends(together(engine, device, [asked("a ring", seed) for seed in range(8)]))
        assert max(device.batches("step", "a ring")) == 2
        assert engine.capabilities()[0].best_batch == 2

    run(play)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dead_device_fails_what_it_had_begun_and_is_restarted_once(run: Run, device: ToyDevice, stage: str) -> None:
    """Every call fails until a plain picture was tried in vain; then the device works again."""

    async def play(engine: AsyncEngine) -> None:
        left = [2]  # the batch of one, and the plain picture

        def trip(at: str, batch: int) -> None:
            if left[0] and (at == stage or left[0] == 1):
                left[0] -= 1
                raise RuntimeError("the device is gone")

        device.trip = trip
        with pytest.raises(EngineFailed):
            await engine.generate([asked()])
        assert is_right((await engine.generate([asked()]))[0], asked())
        assert engine.ready
        assert engine.degraded == "the device thread died of RuntimeError and was restarted"
        stats = engine.stats()
        assert (stats.restarts, stats.failed) == (1, {"engine_failed": 1})

    run(play)


def test_what_waits_survives_the_restart(run: Run, device: ToyDevice) -> None:
    async def play(engine: AsyncEngine) -> None:
        device.gate.clear()
        begun = engine.submit([asked("begun", width=32)])
        await begun_to_run(engine)
        waiting = [engine.submit([asked("waiting", seed)]) for seed in range(5)]
        device.trip = Once(SystemExit("no ordinary error"))
        device.gate.set()
        outcomes = await ends([begun, *waiting])
        assert isinstance(outcomes[0], EngineFailed)
        for seed, outcome in enumerate(outcomes[1:]):
            assert isinstance(outcome, list)
            assert is_right(outcome[0], asked("waiting", seed))
        assert engine.degraded is not None and "SystemExit" in engine.degraded

    run(play)


def test_a_second_death_ends_the_engine(run: Run, device: ToyDevice) -> None:
    async def play(engine: AsyncEngine) -> None:
        device.gate.clear()
        tickets = [engine.submit([asked("a star", seed)]) for seed in range(10)]
        await begun_to_run(engine)

        def trip(stage: str, batch: int) -> None:
            raise RuntimeError("gone for good")

        device.trip = trip
        device.gate.set()
        outcomes = await ends(tickets)
        assert {type(outcome) for outcome in outcomes} == {EngineFailed}
        assert not engine.ready
        assert engine.degraded is not None and "twice" in engine.degraded
        with pytest.raises(EngineFailed):
            engine.submit([asked()])
        assert engine.stats().refused == {"failed": 1}
        await engine.close()
        with pytest.raises(EngineClosed):
            engine.submit([asked()])

    run(play)


def test_a_device_that_cannot_be_warmed_up_fails_the_start(device: ToyDevice, tmp_path: Path) -> None:
    device.trip = Once(RuntimeError("no driver"))

    async def main() -> None:
        engine = AsyncEngine(device, profile=tmp_path)
        waiting = engine.submit([asked()])
        with pytest.raises(RuntimeError, match="no driver"):
            await engine.start()
        assert not engine.ready
        with pytest.raises(TdmServeError):
            await waiting.result()
        await engine.close()

    asyncio.run(main())


def test_a_failing_preview_costs_only_itself(run: Run, device: ToyDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(engine: AsyncEngine) -> None:
        ticket = engine.submit([asked(NAN)], previews=True)  # int(nan) raises
        with pytest.raises(PictureFailed):
            await ticket.result()
        events = ticket._mailbox.progress  # what comes after the failure is not told
        assert [(event.step, event.preview) for event in events] == [(step + 1, None) for step in range(len(events))]
        assert is_right((await engine.submit([asked()], previews=True).result())[0], asked())

    run(play)


class Once:
    """Raises an error at its first call."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __call__(self, stage: str, batch: int) -> None:
        if (error := self.error) is not None:
            self.error = None
            raise error


async def begun_to_run(engine: AsyncEngine) -> None:
    async with asyncio.timeout(10):
        while not engine.stats().running:
            await asyncio.sleep(0.001)
