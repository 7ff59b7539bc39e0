"""What ends a run early: a full disk, a kill, divergence, a broken reward. The last good state stays, and resumes."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_trainee import (
    ToyTrainee,
    distillation,
    r1_config,
    reinforcement,
    student,
    tdm_config,
)

import tdm_finetune.fit
from tdm_finetune.fit import fit, save
from tdm_finetune.rewards import RewardPool
from tdm_finetune.run import Run
from tdm_finetune.student import Student
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config
from tdm_finetune.trainee import Prompt
from tdm_serve.errors import ConfigError, OutputError, RewardError, TrainingDiverged

pytestmark = pytest.mark.usefixtures("toy_rewards")


def train(config: TdmR1Config, trainee: ToyTrainee | None = None) -> Path:
    return fit(reinforcement(config, trainee), config, "tdm-r1")


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "state.pt", weights_only=True)


@contextmanager
def full(limit: int) -> Generator[None]:
    """No file may grow beyond `limit` bytes: writes end as they do on a full disk, with an error of the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Interrupted(Reinforcement):
    """Ctrl-C in the fifth update."""

    def update(self, prompts: Sequence[Prompt], places: Sequence[int], step: int) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return super().update(prompts, places, step)


def half_done(tmp_path: Path, **values: Any) -> TdmR1Config:
    """A config whose run was stopped after four of twelve updates."""
    config = r1_config(tmp_path / "run", steps=12, save_every=4, **values)
    trainer = Interrupted(config, student(config), RewardPool(config.reward))
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, config, "tdm-r1")
    trainer.close()
    assert state_of(config.run)["step"] == 4
    return config


def test_a_full_disk_leaves_the_last_state(tmp_path: Path) -> None:
    config = half_done(tmp_path)
    before = (config.run / "state.pt").read_bytes()
    with full(len(before) - 2000), pytest.raises(OutputError) as caught:
        train(config)
    assert "the state at step 8 cannot be written" in str(caught.value)
    assert f"the one before it is intact in {config.run / 'state.pt'}" in str(caught.value)
    assert (config.run / "state.pt").read_bytes() == before
    assert not [path.name for path in config.run.iterdir() if path.name.startswith(".")]
    train(config)  # with room again, it goes on
    assert state_of(config.run)["step"] == 12


FULL = {
    "log.jsonl": "cannot write to the run folder",
    "sheet.png": "cannot write to the run folder",
    f".state.pt.{os.getpid()}": "cannot be written",
}


@pytest.mark.parametrize("name", FULL, ids=["log", "sheet", "state"])
def test_every_file_that_meets_a_full_disk(tmp_path: Path, name: str) -> None:
    """/dev/full answers as a disk without room does, with ENOSPC."""
    config = half_done(tmp_path)
    (config.run / name).unlink(missing_ok=True)
    (config.run / name).symlink_to("/dev/full")
    with pytest.raises(OutputError, match=FULL[name]) as caught:
        train(config)
    assert os.strerror(errno.ENOSPC) in str(caught.value)
    assert str(config.run) in str(caught.value)
    assert state_of(config.run)["step"] in (4, 8)
    (config.run / name).unlink(missing_ok=True)
    train(config)
    assert state_of(config.run)["step"] == 12 and (config.run / "adapter.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk(tmp_path: Path) -> None:
    """Its writer is a thread of its own, and the first to need room."""
    config = half_done(tmp_path)
    with full(1), pytest.raises(OutputError, match=r"cannot write to the run folder .*File too large"):
        train(config)
    for thread in threading.enumerate():
        if "AsyncWriter" in type(thread).__name__:
            thread.join(10)  # or its exception would be found in another test
    assert state_of(config.run)["step"] == 4


@pytest.mark.parametrize("rank", [2, 0])
def test_what_was_trained_on_a_full_disk(tmp_path: Path, rank: int) -> None:
    trainer = distillation(tdm_config(tmp_path, rank=rank))
    with full(100), pytest.raises(OutputError, match=r"cannot write what was trained .* resume to try again"):
        save(trainer.student, "tdm", {})
    assert "version.json" not in {path.name for path in tmp_path.iterdir()}


def test_resuming_with_another_config_shows_the_difference(tmp_path: Path) -> None:
    config = half_done(tmp_path)
    before = (config.run / "state.pt").read_bytes()
    changed = r1_config(config.run, steps=12, save_every=4, seed=3, categories=("dark",))
    with pytest.raises(ConfigError) as caught:
        train(changed)
    assert "categories: [] -> ['dark']; seed: 0 -> 3" in str(caught.value)
    assert "name another --run folder" in str(caught.value)
    assert (config.run / "state.pt").read_bytes() == before


def test_a_killed_write_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file beside it, as a process that dies while it writes leaves."""
    config = half_done(tmp_path)
    before = (config.run / "state.pt").read_bytes()
    (config.run / ".state.pt.99999").write_bytes(before[: len(before) // 2])
    train(config)
    assert state_of(config.run)["step"] == 12


@pytest.mark.parametrize(
    ("role", "term"),
    [
        ("fake", "generator_kl"),  # where a fake score that is beyond all bounds shows first
        ("preference", "generator_reward"),
        ("generator", "(fake|surrogate|generator)_[a-z]+"),
    ],
)
def test_an_absurd_rate_is_noticed_and_named(tmp_path: Path, role: str, term: str) -> None:
    config = half_done(tmp_path)
    before = (config.run / "state.pt").read_bytes()
    trainer = reinforcement(config)
    getattr(trainer, role).rate = 1e25
    with pytest.raises(
        TrainingDiverged, match=rf"^{term} is (nan|inf) at update [56]; the last good state is"
    ) as caught:
        fit(trainer, config, "tdm-r1")
    assert str(config.run / "state.pt") in str(caught.value)
    assert (config.run / "state.pt").read_bytes() == before
    train(config)
    assert state_of(config.run)["step"] == 12


def test_a_slow_explosion_is_named(tmp_path: Path) -> None:
    """A reward that runs away stays finite for long."""
    config = r1_config(tmp_path / "run", steps=60, save_every=5, reward="toy-runaway(after=24)")
    with pytest.raises(TrainingDiverged, match=r"^reward exploded: \S+ at update 27, usually 0\.\d+"):
        train(config)
    assert state_of(config.run)["step"] == 25


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ("toy-nan(after=6)", "returned nan for sample 2"),
        ("toy-short(after=6)", r"returned shape \(15,\) .* shape \(16,\)"),
    ],
)
def test_what_is_no_score_ends_the_run(tmp_path: Path, reward: str, complaint: str) -> None:
    config = r1_config(tmp_path / "run", steps=12, save_every=2, reward=reward)
    with pytest.raises(RewardError, match=complaint):
        train(config)
    state = state_of(config.run)
    assert state["step"] == 6
    reinforcement(config).load(state)


def test_a_run_that_gets_no_better_stops_with_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter((0.2, 0.6, 0.5, 0.4, 0.3))
    best: list[list[torch.Tensor]] = []

    def scored(student: Student, _run: Run) -> dict[str, float]:
        best.append([tensor.clone() for tensor in student.average.state_dict().values()])
        return {"soft": next(found)}

    monkeypatch.setattr(tdm_finetune.fit, "score", scored)
    config = r1_config(tmp_path, steps=50, score_every=2, patience=2)
    train(config)
    state = state_of(tmp_path)
    assert state["step"] == 8  # two scores after the best, at 4
    assert all(torch.equal(a, b) for a, b in zip(best[1], state["average"].values(), strict=True))
    train(config)  # it is over: a resume trains no further
    assert state_of(tmp_path)["step"] == 8


def test_what_a_killed_run_logged_after_its_state_is_not_logged_twice(tmp_path: Path) -> None:
    config = r1_config(tmp_path, steps=20, save_every=10, score_every=20)
    train(config)
    rows = (tmp_path / "log.jsonl").read_text()
    for lost in ('{"step": 30, "elapsed_s": 9.0, "reward": 0.5}\n', '{"step": 3'):
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write(lost)
    train(config)
    assert (tmp_path / "log.jsonl").read_text().splitlines()[: len(rows.splitlines())] == rows.splitlines()
    assert '"step": 30' not in (tmp_path / "log.jsonl").read_text()
