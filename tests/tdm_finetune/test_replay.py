"""Rated recipes are replayed as they were served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_finetune.choices import Choices
from tdm_finetune.families import load_trainee
from tdm_finetune.replay import Replay
from tdm_finetune.student import Student
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config
from tdm_finetune.workers import Workers
from tdm_serve import Pipeline
from tdm_serve.errors import ConfigError

PROMPT = "two red circles"
LIKES = {11: True, 12: False, 13: 0.5}  # seed -> rating


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("default-tdm", device="cpu")


@pytest.fixture(scope="module")
def student() -> Student:
    config = TdmR1Config(checkpoint="default-tdm", group=4)
    return Student(config, load_trainee("default-tdm", Choices(), torch.device("cpu")), Workers())


def write(path: Path, checkpoint: str, prompts: Sequence[str] = (PROMPT,), size: str = "128x128") -> Path:
    """A feedback file with the ratings of LIKES for every prompt."""
    shared = {"model": "default-tdm", "checkpoint_hash": checkpoint, "size": size, "time": "2026-11-22T10:00:00Z"}
    lines = [{"prompt": p, "seed": seed, "like": like, **shared} for p in prompts for seed, like in LIKES.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_replayed_picture_is_the_served_one(tmp_path: Path, pipeline: Pipeline, student: Student) -> None:
    path = write(tmp_path / "likes.jsonl", pipeline.info.checkpoint_hash)
    replay = Replay(path, student, 4)
    [prompt] = islice(replay.prompts(0), 1)
    batch = student.batch([prompt], 4, 0, range(1))
    trajectory, ratings = replay.trajectory(batch)
    replayed = student.trainee.decode(trajectory.states[-1]).numpy()
    by_rating = {1.0: 11, -1.0: 12, 0.5: 13}
    assert sorted(ratings.tolist()) == [-1.0, -1.0, 0.5, 1.0]  # three recipes make a group of four, the worst twice
    for picture, rating in zip(replayed, ratings.tolist(), strict=True):
        [served] = pipeline(PROMPT, seed=by_rating[rating])
        difference = np.abs(np.asarray(served.image).astype(int) - picture.astype(int))
        assert difference.max() <= 1


def test_every_rated_prompt_comes_round_once_per_epoch(tmp_path: Path, student: Student) -> None:
    prompts = ["a red circle", "a blue star", "a white ring"]
    path = write(tmp_path / "likes.jsonl", student.trainee.checkpoint_hash, prompts)
    replay = Replay(path, student, 4)
    drawn = [prompt.text for prompt in islice(replay.prompts(3), 6)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == sorted(prompts)
    assert drawn == [prompt.text for prompt in islice(replay.prompts(3), 6)]


@pytest.mark.parametrize("change", ["checkpoint", "size"])
def test_what_another_checkpoint_or_size_made_is_refused(tmp_path: Path, student: Student, change: str) -> None:
    path = tmp_path / "likes.jsonl"
    if change == "checkpoint":
        write(path, "0123abcd")
    else:
        write(path, student.trainee.checkpoint_hash, size="64x64")
    with pytest.raises(ConfigError, match=r"1 groups of two or more pictures.*none of them is from checkpoint"):
        Replay(path, student, 4)


def test_a_large_group_keeps_its_worst_and_its_best(tmp_path: Path, student: Student) -> None:
    path = write(tmp_path / "likes.jsonl", student.trainee.checkpoint_hash)
    replay = Replay(path, student, 2)
    batch = student.batch(list(islice(replay.prompts(0), 1)), 2, 0, range(1))
    _, ratings = replay.trajectory(batch)
    assert ratings.tolist() == [-1.0, 1.0]


def test_ratings_alone_reinforce_and_no_other_reward_is_asked(tmp_path: Path, student: Student) -> None:
    path = write(tmp_path / "likes.jsonl", student.trainee.checkpoint_hash)
    config = TdmR1Config(checkpoint="default-tdm", feedback=path, groups=1, group=4, fake_warmup=0)
    assert config.rewards() is None
    trainer = Reinforcement(config, student, None)
    before = trainer.generator.role.parameters[1].detach().clone()
    scalars = trainer.update(list(islice(trainer.prompts(0), 1)), range(1), 0)
    assert scalars["rated_reward"] == pytest.approx((1.0 + 0.5 - 1.0 - 1.0) / 4)
    assert "reward" not in scalars
    assert not before.equal(trainer.generator.role.parameters[1])
