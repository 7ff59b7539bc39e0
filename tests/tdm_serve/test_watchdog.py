"""A device that hangs is told apart from one that is slow, and forgiven when it comes back; errands between runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tdm_serve import AsyncEngine
from tdm_serve.core import Shape, Terms
from tdm_serve.errors import CheckpointError, ConfigError, DeadlinePassed, EngineClosed, EngineFailed
from tdm_serve.profile import Profile
from tdm_serve.scheduler import Policy, Stage
from tdm_serve.watchdog import COMPILE_S, TIMES_PREDICTED, Doing, Watch
from tests.tdm_serve.toy_device import ToyDevice, asked, is_right

SHAPE = Shape(64, 64, 32)
STEP = Doing(Stage.STEP, SHAPE, 2)
HANG_S = 0.2


@pytest.fixture
def device() -> ToyDevice:
    return ToyDevice(call_s=0.0005)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not happened():
            await asyncio.sleep(0.005)


def served(
    device: ToyDevice, folder: Path, play: Callable[[AsyncEngine], Awaitable[Any]], hang_s: float | None = HANG_S
) -> None:
    async def scene() -> None:
        engine = AsyncEngine(device, policy=Policy(slack=10.0), profile=folder, hang_s=hang_s)
        await engine.start()
        try:
            await play(engine)
        finally:
            device.gate.set()
            await engine.close()

    asyncio.run(scene())


def test_a_hung_device_refuses_and_comes_back(
    device: ToyDevice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(engine: AsyncEngine) -> None:
        assert engine.ready
        device.gate.clear()
        stuck, waiting = engine.submit([asked("stuck")]), engine.submit([asked("waiting", 5)])
        late = engine.submit([asked("late")], Terms(deadline_ms=600))
        await until(lambda: engine.hung is not None)
        assert not engine.ready
        assert "of 64x64, 32 tokens is not done" in str(engine.hung)
        with pytest.raises(EngineFailed, match=r"the device hangs: .* not done after 0\.2"):
            engine.submit([asked("new")])
        with pytest.raises(EngineFailed, match="hangs"):
            await engine.add_version("toy-new:3")
        with pytest.raises(DeadlinePassed):  # nobody waits longer than asked for, whatever the device does
            await late.result()
        stats = engine.stats()
        assert (stats.hangs, stats.refused["hung"], stats.ready) == (1, 2, False)
        device.gate.set()
        assert is_right((await stuck.result())[0], asked("stuck"))
        assert is_right((await waiting.result())[0], asked("waiting", 5))
        assert engine.ready
        assert engine.hung is None
        assert is_right((await engine.generate([asked("new")]))[0], asked("new"))
        assert engine.capabilities()[0].alone_ms["toy"] < 1000 * HANG_S  # the profile learned nothing of it
        assert engine.stats().hangs == 1

    served(device, tmp_path, play)
    said = [record.getMessage() for record in caplog.records if record.name == "tdm_serve.watchdog"]
    assert [message.partition(":")[0] for message in said] == ["the device hangs", "the device is back"]


def test_a_slow_device_and_a_slow_warm_up_are_no_hangs(tmp_path: Path) -> None:
    device = ToyDevice(call_s=0.02, steps={"toy": 2})  # 20 times that is more than HANG_S
    warm_up: list[float] = []

    def slow_once(stage: str, _batch: int) -> None:
        if stage == "start" and not warm_up:
            warm_up.append(time.monotonic())
            time.sleep(3 * HANG_S)  # like a compiler
        elif len(device.calls) > 30 and stage == "finish":
            time.sleep(1.2 * HANG_S)

    device.trip = slow_once

    async def play(engine: AsyncEngine) -> None:
        await engine.generate([asked(f"a star {number}") for number in range(30)])
        assert engine.stats().hangs == 0

    served(device, tmp_path, play)
    assert warm_up


def test_nothing_is_watched_where_that_was_asked_for(device: ToyDevice, tmp_path: Path) -> None:
    async def play(engine: AsyncEngine) -> None:
        device.gate.clear()
        ticket = engine.submit([asked()])
        await asyncio.sleep(2 * HANG_S)
        assert engine.ready
        device.gate.set()
        await ticket.result()

    served(device, tmp_path, play, hang_s=None)


def test_closing_is_possible_when_a_hung_device_comes_back(device: ToyDevice, tmp_path: Path) -> None:
    async def play(engine: AsyncEngine) -> None:
        device.gate.clear()
        ticket = engine.submit([asked()])
        await until(lambda: engine.hung is not None)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0.02)
        device.gate.set()
        await closing
        assert await ticket.result()

    served(device, tmp_path, play)


def test_closing_does_not_wait_for_ever(device: ToyDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdm_serve.async_engine.HUNG_GRACE_S", 0.1)

    async def play(engine: AsyncEngine) -> None:
        device.gate.clear()
        ticket = engine.submit([asked()])
        await until(lambda: engine.hung is not None)
        async with asyncio.timeout(5):
            await engine.close()
        with pytest.raises(EngineClosed):
            await ticket.result()
        device.gate.set()
        await until(lambda: not engine._thread.alive)

    served(device, tmp_path, play)


def test_the_limit_follows_the_prediction() -> None:
    watch = Watch(1.0)
    watch.begins(STEP, predicted_ms=10.0, now_ms=0.0)
    assert not watch.look(1000)
    assert watch.look(1001)
    assert not watch.look(2000), "one hang is told once"
    assert watch.ends(3000)
    watch.begins(STEP, predicted_ms=200.0, now_ms=0.0)
    assert not watch.look(TIMES_PREDICTED * 200)
    assert not watch.ends(TIMES_PREDICTED * 200)
    assert not watch.look(10**9), "nothing is under way"


def test_a_compiler_has_its_time_once_for_each_kind_of_run() -> None:
    watch = Watch(1.0, compiles=True)
    watch.begins(STEP, 10.0, 0.0)
    assert not watch.look(COMPILE_S * 1000)
    watch.ends(COMPILE_S * 1000)
    watch.begins(STEP, 10.0, 0.0)
    assert watch.look(1001)
    watch.ends(1001)
    watch.begins(Doing(Stage.STEP, SHAPE, 2, models=2), 10.0, 0.0)
    assert not watch.look(COMPILE_S * 1000)


@pytest.mark.parametrize("hang_s", [0, -1.0, float("inf")])
def test_a_limit_that_is_none_is_refused(hang_s: float) -> None:
    with pytest.raises(ConfigError, match=f"hang_s is {hang_s}; it must be a positive number"):
        Watch(hang_s)


def test_a_version_joins_between_two_runs(device: ToyDevice, tmp_path: Path) -> None:
    async def play(engine: AsyncEngine) -> None:
        others = [engine.submit([asked("a star", seed)]) for seed in range(4)]
        info = await engine.add_version("toy-new:3")
        assert engine.infos["toy-new"] is info
        assert list(engine.infos) == ["toy", "toy-long", "toy-new"]
        wanted = asked("by the new one", model="toy-new")
        assert (await engine.generate([wanted]))[0].nfe == 3
        assert "toy-new" in engine.capabilities()[0].alone_ms
        for ticket in others:
            await ticket.result()

    served(device, tmp_path, play)
    assert device.threads == {"tdm-serve device"}


def test_what_joining_takes_is_not_learned_as_the_price_of_a_run(
    device: ToyDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[float] = []
    observe = Profile.observe

    def noted(self: Profile, stage: Stage, shape: Shape, batch: int, ms: float, models: int = 1) -> None:
        learned.append(ms)
        observe(self, stage, shape, batch, ms, models)

    async def play(engine: AsyncEngine) -> None:
        device.trip = lambda stage, _batch: time.sleep(1.0 if stage == "add" else 0.0)
        monkeypatch.setattr(Profile, "observe", noted)
        device.gate.clear()
        tickets = [engine.submit([asked("a star", seed)]) for seed in range(8)]
        await until(lambda: engine.stats().running > 0)
        joined = asyncio.create_task(engine.add_version("toy-new:3"))
        await asyncio.sleep(0.01)  # its errand is there now, so work waits on both sides of it
        device.gate.set()
        await joined
        for ticket in tickets:
            await ticket.result()

    served(device, tmp_path, play, hang_s=None)
    assert learned
    assert max(learned) < 900


def test_a_version_that_cannot_join_harms_nobody(device: ToyDevice, tmp_path: Path) -> None:
    def full(stage: str, _batch: int) -> None:
        if stage == "add":
            raise ConfigError("there is no room")

    async def play(engine: AsyncEngine) -> None:
        with pytest.raises(CheckpointError, match="is no toy"):
            await engine.add_version("toy-new")
        device.trip = full
        with pytest.raises(ConfigError, match="no room"):
            await engine.add_version("toy-new:3")
        device.gate.clear()
        ticket = engine.submit([asked()])
        given_up = asyncio.create_task(engine.add_version("toy-new:3"))
        await asyncio.sleep(0.05)
        given_up.cancel()
        device.gate.set()
        assert await ticket.result()
        await engine.close()
        with pytest.raises(EngineClosed):
            await engine.add_version("toy-new:3")
        assert list(engine.infos) == ["toy", "toy-long"]

    served(device, tmp_path, play)
