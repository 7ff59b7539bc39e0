"""Bad input to the trainers: a sentence before anything is trained, and nothing half-made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdm_finetune.cache import Frozen
from tdm_finetune.fit import make_student
from tdm_finetune.pretrain import PretrainConfig
from tdm_finetune.roles import ADAPTER_FILE
from tdm_finetune.run import Run
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.text import TextConfig
from tdm_finetune.vae import VaeConfig
from tdm_serve.errors import CheckpointError, ConfigError, OutputError, UnknownModel
from tdm_serve.models.catalog import EMBEDDED
from tdm_serve.models.spec import MANIFEST


@pytest.fixture
def with_adapter(tmp_path: Path) -> Path:
    """A checkpoint whose version `tdm`, its default, is an adapter."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "checkpoint"))
    config = TdmConfig(run=tmp_path, checkpoint="default-teacher", rank=2, alpha=2.0)
    generator = make_student(config).generator
    for parameter in generator.parameters:
        torch.nn.init.ones_(parameter)  # an untrained adapter is refused
    generator.save(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["versions"]["tdm"]["adapter"] = ADAPTER_FILE
    (folder / MANIFEST).write_text(json.dumps(manifest | {"default": "tdm"}))
    return folder


OUT_OF_RANGE = [
    (VaeConfig, "batch", 0),
    (VaeConfig, "crop", 30),
    (VaeConfig, "crop", 136),
    (VaeConfig, "learning_rate", 0.0),
    (VaeConfig, "block_channels", (16, 32)),
    (VaeConfig, "block_channels", (16, 32, 64, 100)),
    (TextConfig, "layers", 1),
    (TextConfig, "vocabulary", 200),
    (TextConfig, "width", 100),
    (PretrainConfig, "steps", 0),
    (PretrainConfig, "decay_steps", 0),
    (PretrainConfig, "warmup", 0),
    (PretrainConfig, "save_every", 0),
    (PretrainConfig, "scenes", 63),
    (PretrainConfig, "shift", 0.0),
    (PretrainConfig, "text_tokens", 40),
    (PretrainConfig, "heads", 3),
    (PretrainConfig, "width", 40),
]


@pytest.mark.parametrize(("cls", "field", "value"), OUT_OF_RANGE)
def test_settings_out_of_range(cls: type, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"(must be|pictures have)"):
        cls(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tdm", "--nfe", "0"], ["TdmConfig", "nfe is 0", "at least 1"]),
        (["tdm", "--guidance", "-1"], ["guidance is -1.0", "at least 0"]),
        (["tdm", "--interval", "wide"], ["'wide'", "'shared' or 'separate'"]),
        (["tdm", "--checkpoint", "no-such-model"], ["'no-such-model'", "default-teacher"]),
        (["tdm", "--checkpoint", "."], ["tdm_serve.json"]),
        (["tdm", "--seed", "-1"], ["seed is -1", "at least 0"]),
        (["tdm-r1", "--group", "1"], ["TdmR1Config", "group is 1", "at least 2"]),
        (["tdm-r1", "--micro-batch", "24"], ["micro_batch is 24", "whole groups of 16"]),
        (["tdm-r1", "--reward", "beauty"], ["'beauty' is unknown", "scenes-strict"]),
        (["tdm-r1", "--rank", "0"], ["rank is 0", "full weights", "a LoRA"]),
        (["tdm-r1", "--start", "nowhere"], ["nowhere/state.pt is missing", "tdm-serve finetune tdm"]),
        (["tdm-r1", "--surrogate", "nowhere"], ["nowhere/state.pt is missing", "tdm-serve finetune tdm-r1"]),
        (["tdm-r1", "--prompts", "nowhere.txt"], ["nowhere.txt cannot be read"]),
        (["tdm-r1", "--config", "no-such"], ["'no-such' is neither", "geneval"]),
        (["pretrain"], ["runs/vae/vae is missing", "tdm-serve finetune vae"]),
        (["assemble"], ["runs/vae/vae is missing", "tdm-serve finetune vae"]),
        (["vae", "--config", "no-such.toml"], ["no-such.toml"]),
        (["vae", "--batch", "many"], ["'many'"]),
    ],
    ids=" ".join,
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], words: list[str], refused: Callable[[list[str]], str]
) -> None:
    complaint = refused(["finetune", *arguments])
    for word in words:
        assert word in complaint


def test_parts_that_are_not_trained_yet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="finetune vae"):
        Frozen.load(tmp_path / "vae", EMBEDDED)
    with pytest.raises(CheckpointError, match="finetune text"):
        Frozen.load(EMBEDDED / "vae", tmp_path)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the run folder"):
        Run(tmp_path / "file" / "run", VaeConfig(), total_steps=1)


def test_only_a_base_is_distilled(tmp_path: Path, with_adapter: Path) -> None:
    """An adapter is trained against the base's weights, so fusing another one into them first would spoil it."""

    def distillation(checkpoint: str) -> Distillation:
        config = TdmConfig(run=tmp_path, checkpoint=checkpoint, rank=2, alpha=2.0)
        return Distillation(config, make_student(config))

    with pytest.raises(ConfigError, match=r"is an adapter on a base; .* FOLDER@teacher"):
        distillation(str(with_adapter))
    with pytest.raises(UnknownModel):
        distillation("no-such-model")
    assert distillation(f"{with_adapter}@teacher").student.process.levels(4)[1] == pytest.approx(0.9)
