"""Bad input to the trainers: a sentence before anything is trained, and nothing half-made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdm_finetune.cache import Frozen
from tdm_finetune.pretrain import PretrainConfig
from tdm_finetune.roles import Lora, targets
from tdm_finetune.run import Run
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.text import TextConfig
from tdm_finetune.vae import VaeConfig
from tdm_serve.errors import CheckpointError, ConfigError, OutputError, UnknownModel
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.families.zimage import load_transformer
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.spec import MANIFEST


@pytest.fixture
def with_adapter(tmp_path: Path) -> Path:
    """A checkpoint whose version `tdm`, its default, is an adapter."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "checkpoint"))
    transformer = load_transformer(resolve("default-teacher"))
    (folder / "adapters").mkdir(exist_ok=True)
    where = targets(transformer, ZImageDenoiser(transformer))
    Lora(where, 2, 2.0, torch.Generator()).save(folder / "adapters" / "tdm.safetensors")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["versions"]["tdm"]["adapter"] = "adapters/tdm.safetensors"
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
    (TdmConfig, "nfe", 0),
    (TdmConfig, "batch", 0),
    (TdmConfig, "rank", 0),
    (TdmConfig, "guidance", -0.5),
    (TdmConfig, "generator_rate", -1e-4),
    (TdmConfig, "text_tokens", 0),
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
        (["tdm", "--interval", "wide"], ["'wide'", "'separate' or 'shared'"]),
        (["tdm", "--checkpoint", "no-such-model"], ["'no-such-model'", "default-teacher"]),
        (["tdm", "--checkpoint", "."], ["tdm_serve.json"]),
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
    with pytest.raises(ConfigError, match="version 'tdm', an adapter on a base"):
        Distillation(TdmConfig(run=tmp_path, checkpoint=str(with_adapter)))
    with pytest.raises(UnknownModel):
        Distillation(TdmConfig(run=tmp_path, checkpoint="no-such-model"))
    assert Distillation(TdmConfig(run=tmp_path, checkpoint=f"{with_adapter}@teacher", rank=2)).shift == 3.0
