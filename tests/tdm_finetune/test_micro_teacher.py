"""The micro teacher: it learns, resumes bit for bit, and mishears its captions as often as its config says."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from tdm_finetune.micro import teacher, world
from tdm_finetune.micro.teacher import MicroConfig, Teacher, caption, train
from tdm_finetune.micro.trainee import MicroTrainee
from tdm_finetune.run import Run
from tdm_serve.config import read_toml
from tdm_serve.errors import ConfigError

Kind = Literal["flow", "epsilon"]
PRESETS = Path(teacher.__file__).parent.parent / "presets" / "micro"
TINY = MicroConfig(
    width=32, layers=1, heads=2, steps=3, batch=6, warmup=2, save_every=1, score_every=3, score_prompts=3
)


def log(folder: Path) -> list[dict[str, Any]]:
    """Logged scalars without the clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "elapsed_s"} for row in rows]


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    whole = train(replace(TINY, run=tmp_path / "whole", process=kind))
    config = replace(TINY, run=tmp_path / "stopped", process=kind)
    save = Run.save

    def save_and_stop(self: Run, **state: Any) -> None:
        save(self, **state)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_stop)
        for _ in range(2):
            with pytest.raises(StoppedError):
                train(config)
    assert torch.load(config.run / "state.pt", weights_only=True)["step"] == 2
    train(config)
    expected, found = load_file(whole / "model.safetensors"), load_file(config.run / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert log(config.run)[-1] == log(whole)[-1]
    assert MicroTrainee.load(config.run).settings == config.settings()


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_it_learns(tmp_path: Path, kind: Kind) -> None:
    config = replace(TINY, run=tmp_path, process=kind, steps=60, batch=32, warmup=10, save_every=60, score_every=60)
    student = Teacher(config)
    losses = [student.step(step)["loss"] for step in range(config.steps)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_another_config_is_refused(tmp_path: Path) -> None:
    train(replace(TINY, run=tmp_path))
    with pytest.raises(ConfigError, match=r"colour_noise: 0\.2 -> 0\.1"):
        train(replace(TINY, run=tmp_path, colour_noise=0.1))


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, other = Teacher(TINY), Teacher(replace(TINY, seed=1))
    assert torch.equal(first.batch(2)[0], first.batch(2)[0]) and first.batch(2)[1] == first.batch(2)[1]
    assert not torch.equal(first.batch(2)[0], first.batch(3)[0])
    assert not torch.equal(first.batch(2)[0], other.batch(2)[0])


def test_captions_go_wrong_as_often_as_asked() -> None:
    spec = world.Spec("counting", ("red",), count=3)
    config = replace(TINY, dropout=0.25, count_noise=0.5, colour_noise=0.0)
    rng = random.Random(0)
    said = Counter(caption(spec, rng, config) for _ in range(4000))
    assert said[""] / 4000 == pytest.approx(0.25, abs=0.03)
    assert said["three red squares"] / 4000 == pytest.approx(0.75 * (0.5 + 0.5 / 4), abs=0.03)
    assert set(said) == {"", "one red square", "two red squares", "three red squares", "four red squares"}


def test_true_captions_without_noise() -> None:
    config = replace(TINY, dropout=0.0, count_noise=0.0, colour_noise=0.0, relation_noise=0.0)
    rng = random.Random(0)
    for category in world.CATEGORIES:
        spec = world.draw(category, "train", rng)
        assert caption(spec, rng, config) == world.phrase(spec)


def test_no_caption_asks_for_a_held_out_combination() -> None:
    config = replace(TINY, count_noise=1.0, colour_noise=1.0, relation_noise=1.0)
    rng = random.Random(0)
    held = {p.text for p, _ in zip(world.prompts("heldout"), range(500), strict=False)}
    for category in world.CATEGORIES:
        said = {caption(world.draw(category, "train", rng), rng, config) for _ in range(1000)}
        assert len(said) > 10
        assert not said & held


@pytest.mark.parametrize("name", ["teacher", "teacher-epsilon"])
def test_presets_are_configs_of_their_own_process(name: str) -> None:
    config = MicroConfig(**read_toml(MicroConfig, PRESETS / f"{name}.toml"))
    assert (config.process == "epsilon") == name.endswith("epsilon")
    assert config.run == Path(f"runs/micro-{name}")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("dropout", 1.5, "at most 1"), ("top", 0, "at least 1"), ("top", 2000, "at most 1000"), ("width", 30, "multiple")],
)
def test_bad_values_say_what_is_allowed(field: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; .*{allowed}"):
        replace(MicroConfig(), **{field: value})
