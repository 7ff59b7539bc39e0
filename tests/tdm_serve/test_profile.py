"""The measured cost table: robust, interpolating, kept by device."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_serve.core import Shape
from tdm_serve.errors import ConfigError
from tdm_serve.profile import Device, Profile
from tdm_serve.scheduler import Stage

DEVICE = Device("some device", 2, "float32", "eager", "hash")
SHAPE = Shape(256, 256, 64)


def measured(steps: dict[int, float], start: float = 1.0, decode: float = 5.0) -> Profile:
    profile = Profile(DEVICE)
    for batch, ms in steps.items():
        profile.observe(Stage.START, SHAPE, batch, start * batch)
        profile.observe(Stage.STEP, SHAPE, batch, ms)
        profile.observe(Stage.FINISH, SHAPE, batch, decode * batch)
    return profile


def test_between_and_beyond_what_was_measured() -> None:
    profile = measured({2: 10.0, 4: 16.0, 8: 40.0})
    assert [profile.step_ms(SHAPE, batch, 1) for batch in (1, 2, 3, 4, 6, 8, 16)] == [10, 10, 13, 16, 28, 40, 80]
    assert profile.batches(SHAPE) == (2, 4, 8) and profile.shapes() == (SHAPE,)


def test_unmeasured_shapes_are_scaled_by_what_the_stage_grows_with() -> None:
    profile = measured({1: 10.0})
    double = replace(SHAPE, width=512)
    assert profile.start_ms(double, 1, 0) == 1.0
    assert profile.step_ms(double, 1) == pytest.approx(10.0 * (512 + 64) / (256 + 64))
    assert profile.finish_ms(double, 1) == 10.0
    assert profile.step_ms(replace(SHAPE, guided=True), 1) == 20.0


def test_nothing_measured_at_all_still_answers() -> None:
    profile = Profile(DEVICE)
    assert profile.best_batch(SHAPE) == 1
    assert profile.alone_ms(SHAPE) > 0 and profile.step_ms(SHAPE, 4, 2) > profile.step_ms(SHAPE, 4, 1)


def test_cached_prompts_are_free_unless_that_was_measured() -> None:
    profile = measured({1: 10.0, 2: 12.0}, start=6.0)
    assert [profile.start_ms(SHAPE, 2, cached) for cached in (0, 1, 2)] == [12.0, 6.0, 0.0]
    profile.observe(Stage.START, SHAPE, 0, 0.3)
    assert profile.start_ms(SHAPE, 2, 2) == 0.3 and profile.start_ms(SHAPE, 2, 1) == 6.0


@pytest.mark.parametrize(
    ("steps", "best"),
    [
        ({1: 7.4, 2: 10.6, 4: 23.0, 8: 53.0}, 2),
        ({1: 20.0, 2: 21.0, 4: 24.0, 8: 32.0, 16: 64.0}, 8),
        ({1: 10.0, 2: 19.8, 4: 39.4}, 1),  # two at once gain under 3 %
        ({4: 10.0}, 4),
    ],
)
def test_the_best_batch_makes_most_pictures_a_second(steps: dict[int, float], best: int) -> None:
    assert measured(steps).best_batch(SHAPE) == best


def test_memory_limits_the_batch_and_large_shapes_take_fewer() -> None:
    profile = measured({1: 20.0, 2: 21.0, 4: 24.0, 8: 32.0})
    assert profile.best_batch(SHAPE) == 8
    assert profile.best_batch(replace(SHAPE, width=512, height=512)) == 2
    profile.limit_batch(SHAPE, 5)
    assert profile.best_batch(SHAPE) == 4


def test_versions_are_mixed_only_where_that_was_measured() -> None:
    profile = measured({1: 20.0, 2: 21.0, 4: 24.0})
    assert profile.step_ms(SHAPE, 2, 2) >= 2 * profile.step_ms(SHAPE, 1)
    profile.observe(Stage.STEP, SHAPE, 2, 25.0, models=2)
    assert profile.step_ms(SHAPE, 2, 2) == 25.0 and profile.step_ms(SHAPE, 2, 1) == 21.0


def test_one_slow_sample_spoils_nothing() -> None:
    profile = Profile(DEVICE)
    for ms in (900.0, 10.0, 10.2, 9.9):  # the first run compiles
        profile.observe(Stage.STEP, SHAPE, 1, ms)
    assert profile.step_ms(SHAPE, 1) == pytest.approx(10.0, rel=0.03)
    for ms in (10.0, 10.1, 5000.0, 10.0, 9.9):
        profile.observe(Stage.STEP, SHAPE, 1, ms)
    assert profile.step_ms(SHAPE, 1) == pytest.approx(10.0, rel=0.03)


def test_what_lasts_is_followed() -> None:
    profile = measured({1: 10.0})
    for _ in range(40):
        profile.observe(Stage.STEP, SHAPE, 1, 15.0)
    assert profile.step_ms(SHAPE, 1) == pytest.approx(15.0, rel=0.02)


@given(st.dictionaries(st.integers(1, 32), st.floats(0.1, 1e4), min_size=1), st.integers(1, 64))
def test_estimates_stay_within_what_was_measured(points: dict[int, float], batch: int) -> None:
    profile = Profile(DEVICE)
    for known, ms in points.items():
        profile.observe(Stage.STEP, SHAPE, known, ms)
    ms = profile.step_ms(SHAPE, batch)
    assert min(points.values()) * 0.999 <= ms
    assert ms <= max(points.values()) * max(1.0, batch / max(points)) * 1.001
    assert profile.best_batch(SHAPE) in points


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = measured({1: 7.4, 2: 10.6})
    profile.observe(Stage.STEP, SHAPE, 2, 12.0, models=2)
    profile.limit_batch(SHAPE, 2)
    profile.save(tmp_path / "profile.json")
    again = Profile.load(tmp_path / "profile.json", DEVICE)
    assert again.step_ms(SHAPE, 2) == 10.6 and again.step_ms(SHAPE, 2, 2) == 12.0
    assert again.best_batch(SHAPE) == profile.best_batch(SHAPE) and again.start_ms(SHAPE, 2, 0) == 2.0


@pytest.mark.parametrize("change", [{"threads": 4}, {"dtype": "bfloat16"}, {"checkpoint": "other"}, {"name": "b"}])
def test_a_profile_of_another_device_is_not_used(tmp_path: Path, change: dict[str, object]) -> None:
    measured({1: 7.4}).save(tmp_path / "profile.json")
    assert not Profile.load(tmp_path / "profile.json", replace(DEVICE, **change)).shapes()  # type: ignore[arg-type]
    assert not Profile.load(tmp_path / "absent.json", DEVICE).shapes()


def test_another_format_is_measured_again(tmp_path: Path) -> None:
    measured({1: 7.4}).save(tmp_path / "profile.json")
    data = json.loads((tmp_path / "profile.json").read_text()) | {"format": 99}
    (tmp_path / "profile.json").write_text(json.dumps(data))
    assert not Profile.load(tmp_path / "profile.json", DEVICE).shapes()


@pytest.mark.parametrize("text", ["", "[]", "{}", "{not json"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"profile\.json is no profile of tdm-serve"):
        Profile.load(path, DEVICE)


@pytest.mark.parametrize(
    ("stage", "batch", "ms", "models"),
    [(Stage.STEP, 0, 1.0, 1), (Stage.STEP, 1, 0.0, 1), (Stage.FINISH, 1, math.nan, 1), (Stage.STEP, 2, 1.0, 3)],
)
def test_senseless_samples_are_refused(stage: Stage, batch: int, ms: float, models: int) -> None:
    profile = Profile(DEVICE)
    with pytest.raises(ConfigError, match="batch of"):
        profile.observe(stage, SHAPE, batch, ms, models)
    with pytest.raises(ConfigError, match="at least 1"):
        profile.limit_batch(SHAPE, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        Profile(DEVICE, steps=0)
