"""The loop around the trainers: what a run leaves behind, resuming, a full disk, divergence, and bad input."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_trainee import (
    CATEGORIES,
    ToyTrainee,
    diffusion,
    distillation,
    r1_config,
    reinforcement,
    same,
    student,
    tdm_config,
)

from tdm_finetune.fit import fit, save
from tdm_finetune.rewards import RewardPool
from tdm_finetune.tdm import TdmConfig
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config
from tdm_finetune.trainee import Prompt
from tdm_serve.errors import ConfigError, OutputError, RewardError, TrainingDiverged

pytestmark = pytest.mark.usefixtures("toy_rewards")


def train(config: TdmR1Config, trainee: ToyTrainee | None = None) -> Path:
    return fit(reinforcement(config, trainee), config, "tdm-r1")


def distil(config: TdmConfig, trainee: ToyTrainee | None = None) -> Path:
    return fit(distillation(config, trainee), config, "tdm")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "state.pt", weights_only=True)


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    run = train(r1_config(tmp_path / "deep" / "run", steps=25, score_every=10))
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter.safetensors", "config.json", "log.jsonl", "sheet.png", "state.pt", "tensorboard", "version.json",
    }  # fmt: skip
    rows = log(run)
    assert [row["step"] for row in rows] == [10, 10, 20, 20, 25, 25]
    for losses, scores in zip(rows[::2], rows[1::2], strict=True):
        assert {"elapsed_s", "reward", "constant_groups", "fake_loss", "generator_kl", "surrogate_drift"} <= set(losses)
        assert {"val_strict", "val_soft", "val_palette_error", "val_diversity", "val_compressibility"} <= set(scores)
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["reward"] == "toy" and settings["machine"]["versions"]["torch"]


def test_the_version_beside_the_adapter(tmp_path: Path) -> None:
    run = train(r1_config(tmp_path, steps=4, nfe=4))
    version = json.loads((run / "version.json").read_text())
    assert version["sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5]) and version["shift"] == 3.0
    assert (version["sampler"], version["guidance"]) == ("euler", 1.0)
    assert version["description"] == "Reinforced to 4 network evaluations with TDM-R1."
    lineage = version["lineage"]
    assert lineage["method"] == "tdm-r1" and lineage["config"]["steps"] == 4
    assert lineage["validation"]["soft"] == pytest.approx(log(run)[-1]["val_soft"], abs=1e-6)
    other = distil(tdm_config(tmp_path / "other", nfe=3), ToyTrainee(diffusion()))
    assert json.loads((other / "version.json").read_text())["sampler"] == "ddim"


def test_what_is_saved_is_the_average(tmp_path: Path) -> None:
    run = train(r1_config(tmp_path, steps=4, ema=0.9))
    state, written = state_of(run), load_file(run / "adapter.safetensors")
    names = [name for name in ToyTrainee().linears() for _ in "AB"]
    for index, (name, value) in enumerate(zip(names, state["average"].values(), strict=True)):
        assert torch.equal(written[f"transformer.{name}.lora_{'AB'[index % 2]}.weight"], value.to(torch.bfloat16))
    assert not same(list(state["average"].values()), state["generator"])


def test_tensorboard_and_the_sheet(tmp_path: Path) -> None:
    run = train(r1_config(tmp_path, steps=20, score_every=10, score_prompts=24))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags: dict[str, Any] = events.Tags()
    assert {"reward", "fake_loss", "generator_gradient_norm", "val_soft", "val_diversity"} <= set(tags["scalars"])
    assert tags["images"] == ["sheet"]
    rows = {row["step"]: row for row in log(run) if "reward" in row}
    for event in events.Scalars("reward"):
        assert event.value == pytest.approx(rows[event.step]["reward"], abs=1e-5)
    with Image.open(run / "sheet.png") as sheet:
        assert sheet.size == (10 * 4, 2 * 4)  # whole rows of ten pictures
        assert np.asarray(sheet).std() > 0


def test_a_logged_mean_counts_only_the_updates_that_have_the_term(tmp_path: Path) -> None:
    """Of the first ten updates the generator trains in three."""
    config = r1_config(tmp_path, steps=10, fake_warmup=7, score_every=10)
    row = log(train(config))[0]
    assert 0.45 < row["surrogate_group_weight"] < 0.55  # undecided; over all ten it would be 0.15
    assert row["step"] == 10 and row["fake_loss"] > 0


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


def test_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    config = r1_config(tmp_path, steps=6, score_every=6)
    train(config)
    before = state_of(config.run)
    version = json.loads((tmp_path / "version.json").read_text())
    adapter = load_file(tmp_path / "adapter.safetensors")
    train(config)
    assert state_of(config.run)["step"] == 6 and same(state_of(config.run)["generator"], before["generator"])
    again = json.loads((tmp_path / "version.json").read_text())
    assert again["lineage"]["validation"] == version["lineage"]["validation"]
    assert same(list(load_file(tmp_path / "adapter.safetensors").values()), list(adapter.values()))


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


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown reward": ({"reward": "beauty"}, "'beauty' is unknown.*toy"),
    "no prompts": ({"prompts": "empty.txt"}, "empty.txt holds no prompt"),
    "bad line": ({"prompts": "bad.jsonl"}, "bad.jsonl, line 2"),
    "no file": ({"prompts": "nowhere.txt"}, "nowhere.txt cannot be read"),
    "category": ({"categories": ("bride",)}, f"bride never occur; the prompts have {', '.join(CATEGORIES)}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_no_run_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the corrected command is not taken for another config of the same run."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("bad.jsonl").write_text('{"prompt": "bright 1"}\nbright 2\n')
    values, complaint = BAD[name]
    if "prompts" in values:
        values = values | {"prompts": Path(values["prompts"])}
    with pytest.raises(ConfigError, match=complaint):
        train(r1_config(tmp_path / "run", **values))
    assert not (tmp_path / "run").exists()


def test_prompts_of_a_file_train_and_are_scored(tmp_path: Path) -> None:
    """Without what the world's checker needs, so only the pictures' health is watched."""
    path = tmp_path / "prompts.txt"
    path.write_text("bright 1\nbright 2\ndark 3\n")
    run = train(r1_config(tmp_path / "run", steps=4, prompts=path, reward="toy-sign", watch="toy-sign,toy-constant"))
    scores = log(run)[-1]
    assert "val_strict" not in scores and scores["val_diversity"] > 0
    assert 0.1 <= scores["val_watched"] <= 1.1


def test_the_run_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the run folder"):
        train(r1_config(tmp_path / "file" / "run"))


def test_through_the_real_command(refused: Callable[[list[str]], str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("groups = 4\nkl_wait = 0.5\n")
    complaint = refused(["finetune", "tdm-r1", "--config", str(tmp_path / "x.toml")])
    assert "unknown key 'kl_wait'" in complaint and "kl_weight" in complaint
