"""Warming up: what is measured, what is kept, and when it is measured again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tdm_serve import AsyncEngine
from tdm_serve.core import Shape
from tdm_serve.errors import ConfigError
from tdm_serve.identity import identity_of
from tdm_serve.profile import Profile
from tdm_serve.scheduler import Stage
from tdm_serve.warmup import WarmUp, load_profile, profile_path, prompt_of, save_profile
from tests.tdm_serve.toy_device import OutOfToyMemory, ToyDevice, ToySample, asked

SHAPE = Shape(64, 64, 32)


class Timed(ToyDevice):
    """Calls take `fixed_s` on its own clock, and `each_s` more for every picture from the `free`-th on."""

    def __init__(self, fixed_s: float, each_s: float = 0.0, free: int = 1, models: int = 1) -> None:
        super().__init__(steps={f"toy-{number}": 4 for number in range(models)})
        self.fixed_s, self.each_s, self.free = fixed_s, each_s, free
        self.now_s = 0.0
        self.trip = self._work

    def _work(self, stage: str, batch: int) -> None:
        first = self.count()[stage] == 1  # whatever is done once
        self.now_s += self.fixed_s + self.each_s * max(0, batch - self.free) + first * 10 * self.fixed_s


def warm_up(device: Timed, shapes: Sequence[Shape] = (SHAPE,), **options: Any) -> WarmUp:
    options = {"max_batch": 16, "stopping": bool} | options
    return WarmUp(device, shapes, clock=lambda: device.now_s, **options)


def measured(device: Timed, shapes: Sequence[Shape] = (SHAPE,), **options: Any) -> Profile:
    return warm_up(device, shapes, **options).run(Profile(identity_of(device)))


def test_batches_grow_until_they_gain_nothing() -> None:
    """Four pictures cost what one costs; from there each costs as much again."""
    profile = measured(Timed(0.004, each_s=0.004, free=4))
    assert profile.batches(SHAPE) == (1, 2, 4, 8)
    assert profile.best_batch(SHAPE) == 4
    for batch, ms in ((1, 4.0), (2, 4.0), (4, 4.0), (8, 20.0)):
        assert profile.step_ms(SHAPE, batch) == pytest.approx(ms)
        assert profile.start_ms(SHAPE, batch, 0) == pytest.approx(ms)
        assert profile.finish_ms(SHAPE, batch) == pytest.approx(ms)


def test_a_slow_device_is_not_kept_busy_with_large_batches() -> None:
    assert measured(Timed(3.0)).batches(SHAPE) == (1,)


def test_no_batch_beyond_what_is_allowed_or_fits() -> None:
    assert measured(Timed(0.001), max_batch=4).batches(SHAPE) == (1, 2, 4)
    device = Timed(0.001)
    device.fits["finish"] = 5
    profile = measured(device)
    assert profile.batches(SHAPE) == (1, 2, 4)
    assert profile.best_batch(SHAPE) == 4
    assert device.emptied
    assert not list(device.live)
    device.fits["start"] = 0
    with pytest.raises(OutOfToyMemory):
        measured(device)


def test_several_versions_are_measured_in_one_batch() -> None:
    profile = measured(Timed(0.001, models=3), max_batch=4)
    assert profile.batches(SHAPE, Stage.STEP, models=2) == (2, 4)
    assert profile.batches(SHAPE, Stage.STEP, models=3) == (4,)


def test_every_prompt_is_new_to_the_cache() -> None:
    device = Timed(0.0005)
    measured(device, [SHAPE, Shape(64, 64, 64)], max_batch=2)
    assert device.cache.hits == 0


def test_prompts_have_the_length_that_is_wanted() -> None:
    device = ToyDevice()
    for text in (32, 64):
        prompt, words = prompt_of(device, Shape(64, 64, text), "7")
        assert device.check(asked(prompt)).text == text
        assert prompt_of(device, Shape(64, 64, text), "7", words) == (prompt, words)
    with pytest.raises(ConfigError, match="96 tokens"):
        prompt_of(device, Shape(64, 64, 96), "7")


def test_a_stored_profile_is_looked_at_and_kept() -> None:
    device = Timed(0.002)
    stored = measured(device, max_batch=8)
    device.calls.clear()
    assert warm_up(device, max_batch=8).run(stored) is stored
    sizes = {len(called) for _, called in device.calls}
    assert sizes == {1, stored.best_batch(SHAPE)}


@pytest.mark.parametrize("change", ["slower", "another shape"])
def test_a_stored_profile_that_does_not_hold_is_measured_anew(change: str) -> None:
    stored = measured(Timed(0.002), max_batch=4)
    shape = SHAPE if change == "slower" else Shape(32, 32, 32)
    device = Timed(0.01 if change == "slower" else 0.002)
    profile = warm_up(device, [shape], max_batch=4).run(stored)
    assert profile is not stored
    assert profile.batches(shape) == (1, 2, 4)


def test_every_batch_is_run_where_each_is_compiled() -> None:
    device = Timed(0.001)
    measured(device, max_batch=6, every_batch=True)
    best = max(len(called) for _, called in device.calls)
    assert {len(called) for stage, called in device.calls if stage == "step"} == set(range(1, best + 1))


def test_stopping_ends_it_between_two_passes() -> None:
    device = Timed(0.001)
    profile = measured(device, stopping=lambda: len(device.calls) > 7)
    assert len(device.calls) <= 2 * 5
    assert profile.batches(SHAPE) == ()


def test_where_profiles_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, other = identity_of(ToyDevice()), identity_of(ToyDevice(steps={"another": 2}))
    assert profile_path(tmp_path / "mine.json", device) == tmp_path / "mine.json"
    assert profile_path(tmp_path, device).parent == tmp_path
    assert profile_path(tmp_path, device) != profile_path(tmp_path, other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TDM_SERVE_STATE_DIR", raising=False)
    assert profile_path(None, device).parent == tmp_path / "cache" / "tdm-serve"
    monkeypatch.setenv("TDM_SERVE_STATE_DIR", str(tmp_path / "state"))
    assert profile_path(None, device).parent == tmp_path / "state"


def test_files_that_cannot_be_used_do_not_stop_anybody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = identity_of(ToyDevice())
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert load_profile(broken, device, 4).shapes() == ()
    assert "broken.json" in caplog.text
    file = tmp_path / "file"
    file.write_text("")
    save_profile(Profile(device), file / "profile.json")
    assert "not kept" in caplog.text


def test_the_engine_learns_while_it_runs_and_keeps_that(tmp_path: Path) -> None:
    device = ToyDevice(call_s=0.001)

    async def main() -> None:
        engine = AsyncEngine(device, max_batch=2, profile=tmp_path, warm=[(64, 64), Shape(32, 32, 64)])
        assert engine.capabilities() == []
        await engine.start()
        shapes = [(shape.width, shape.text) for shape in engine.capabilities()]
        assert shapes == [(64, 32), (32, 64)]
        await engine.generate([asked(width=128)])
        await engine.close()

    asyncio.run(main())
    [path] = tmp_path.iterdir()
    widths = {entry["shape"]["width"] for entry in json.loads(path.read_text())["entries"]}
    assert widths == {32, 64, 128}


def test_samples_of_the_warm_up_are_gone() -> None:
    device = Timed(0.001)
    measured(device, max_batch=2)
    assert not [sample for sample in device.live if isinstance(sample, ToySample)]
