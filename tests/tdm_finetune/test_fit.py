"""The loop around the trainers: what a run leaves behind, and bad input. Its mishaps are in test_mishaps.py."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    tdm_config,
)

from tdm_finetune.fit import fit
from tdm_finetune.tdm import TdmConfig
from tdm_finetune.tdm_r1 import TdmR1Config
from tdm_serve.errors import ConfigError, OutputError

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
