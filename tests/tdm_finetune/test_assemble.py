"""Trained parts become a checkpoint that is served; unfinished ones are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_finetune.assemble import AssembleConfig, assemble
from tdm_finetune.choices import Choices
from tdm_finetune.families import load_trainee
from tdm_finetune.roles import ADAPTER_FILE, Roles
from tdm_finetune.run import VERSION_FILE
from tdm_serve import Pipeline
from tdm_serve.errors import CheckpointError, OutputError
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.spec import Adapter


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> AssembleConfig:
    """The embedded checkpoint's parts as their trainers would have left them, and an adapter that does something."""
    folder = tmp_path_factory.mktemp("runs")
    for run, parts in {"vae": ["vae"], "text": ["text_encoder", "tokenizer"], "pretrain": ["transformer"]}.items():
        for part in parts:
            shutil.copytree(EMBEDDED / part, folder / run / part)
    roles = Roles(load_trainee("default-teacher", Choices(), torch.device("cpu")), 4, 8.0)
    role = roles.new(torch.Generator().manual_seed(3))
    for parameter in role.parameters:
        torch.nn.init.normal_(parameter.data, std=0.05, generator=torch.Generator().manual_seed(4))
    (folder / "tdm").mkdir()
    role.save(folder / "tdm")
    version = {"description": "two steps", "sampler": "euler", "shift": 3.0, "sigmas": [1.0, 0.75], "guidance": 1.0}
    (folder / "tdm" / VERSION_FILE).write_text(json.dumps(version))
    for run in ("vae", "text", "pretrain", "tdm"):
        (folder / run / "config.json").write_text(json.dumps({"config": {"run": str(folder / run), "steps": 3}}))
        (folder / run / "log.jsonl").write_text(f'{{"run": "{run}"}}\n')
    return AssembleConfig(folder / "out", folder / "vae", folder / "text", folder / "pretrain", folder / "tdm")


def test_the_parts_become_a_checkpoint(runs: AssembleConfig, pipeline: Pipeline, tmp_path: Path) -> None:
    folder = assemble(replace(runs, output=tmp_path / "new" / "out", teacher_steps=3))
    few, teacher = Pipeline.from_pretrained(folder), Pipeline.from_pretrained(f"{folder}@teacher")
    assert (few.info.nfe, few.info.sigmas, few.info.guidance) == (2, (1.0, 0.75), 1.0)
    assert (teacher.info.nfe, teacher.info.guidance) == (6, 3.0)
    pictures = [
        np.asarray(p("a red star", seed=1, steps=4, guidance=1.0, allow_untrained_schedule=True)[0].image)
        for p in (few, teacher)
    ]
    assert (pictures[0] != pictures[1]).any()  # the adapter is at work
    # the embedded checkpoint was rounded before, so its base is the same
    before = Pipeline.from_pretrained("default-teacher")("a red star", seed=1, steps=4, guidance=1.0)[0].image
    assert np.array_equal(pictures[1], np.asarray(before))
    for run in ("vae", "text", "pretrain", "tdm"):
        assert (folder / "training" / run / "log.jsonl").read_text() == f'{{"run": "{run}"}}\n'
    for path in folder.rglob("*.json"):
        assert str(runs.output.parent) not in path.read_text(), path  # where it was trained stays there
    assert json.loads((folder / "training" / "vae" / "config.json").read_text())["config"] == {"run": "vae", "steps": 3}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*"))  # readable by everybody


def test_a_reinforced_version_is_the_default_beside_the_distilled_one(runs: AssembleConfig, tmp_path: Path) -> None:
    reinforced = Path(shutil.copytree(runs.tdm or "", tmp_path / "tdm-r1"))
    config = {"config": {"run": "runs/tdm-r1", "start": str(runs.tdm)}}
    (reinforced / "config.json").write_text(json.dumps(config))
    folder = assemble(replace(runs, output=tmp_path / "out", tdm_r1=reinforced))
    assert resolve(folder).version == "tdm-r1"
    assert resolve(f"{folder}@tdm").adapters == (Adapter(folder / "adapters" / "tdm.safetensors"),)
    # the run it started from is a stage of its own, so its record is there once
    assert sorted(path.name for path in (folder / "training" / "tdm-r1").iterdir()) == ["config.json", "log.jsonl"]


def test_without_a_distillation_the_teacher_is_the_default(runs: AssembleConfig, tmp_path: Path) -> None:
    spec = resolve(assemble(replace(runs, output=tmp_path / "out", tdm=None)))
    assert (spec.version, spec.adapters, len(spec.sigmas)) == ("teacher", (), 25)


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("vae", ""),
        ("vae", "vae"),
        ("text", "tokenizer"),
        ("pretrain", "transformer"),
        ("tdm", ADAPTER_FILE),
        ("tdm", VERSION_FILE),
        ("tdm", "log.jsonl"),
    ],
)
def test_an_unfinished_run_is_named(runs: AssembleConfig, tmp_path: Path, stage: str, part: str) -> None:
    copy = Path(shutil.copytree(runs.runs[stage], tmp_path / "run"))
    missing = copy / part
    if missing.is_dir():
        shutil.rmtree(missing)
    else:
        missing.unlink()
    config = replace(runs, output=tmp_path / "out", **{stage: copy})
    with pytest.raises(CheckpointError, match=rf"{missing}.* is missing; `tdm-serve finetune {stage}`"):
        assemble(config)
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}


def test_nothing_is_overwritten(runs: AssembleConfig, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        assemble(replace(runs, output=tmp_path))
    with pytest.raises(OutputError, match="cannot write"):
        assemble(replace(runs, output=tmp_path / "kept" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(("field", "value"), [("teacher_steps", 0), ("teacher_guidance", -1.0), ("shift", 0.0)])
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}; it must be"):
        AssembleConfig(**{field: value})  # pyright: ignore[reportArgumentType]
