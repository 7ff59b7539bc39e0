"""Puts trained parts together as a checkpoint: one diffusers folder, its versions, and how they were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoTokenizer, Qwen3Model

from tdm_finetune.extend import extended
from tdm_finetune.roles import ADAPTER_FILE, FULL_FOLDER
from tdm_finetune.run import CONFIG_FILE, LOG_FILE, VERSION_FILE, finished
from tdm_serve.config import at_least, positive
from tdm_serve.convert import forget_paths
from tdm_serve.files import new_folder
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import FORMAT, MANIFEST
from tdm_serve.sampling import sigma_grid

LIMITS = {"width": 128, "height": 128, "size_multiple": 16, "min_side": 64, "max_side": 256, "max_prompt_tokens": 64}


@dataclass(frozen=True, slots=True)
class AssembleConfig:
    """`tdm-serve finetune assemble`."""

    output: Path = Path("runs/checkpoint")
    vae: Path = Path("runs/vae")
    text: Path = Path("runs/text")
    pretrain: Path = Path("runs/pretrain")
    tdm: Path | None = None  # a distillation run; its adapter becomes the default version
    tdm_r1: Path | None = None  # a TDM-R1 run; its adapter becomes the default version instead
    base: str | None = None  # id or folder, of any family, that the runs trained on; none: the stages above made one
    teacher_steps: int = 25
    teacher_guidance: float = 3.0
    shift: float = 3.0

    def __post_init__(self) -> None:
        at_least(self, 1, "teacher_steps")
        at_least(self, 0, "teacher_guidance")
        positive(self, "shift")

    @property
    def runs(self) -> dict[str, Path]:
        """Stage -> the run that it left behind."""
        stages = {"vae": self.vae, "text": self.text, "pretrain": self.pretrain}
        return self.adapters if self.base is not None else stages | self.adapters

    @property
    def adapters(self) -> dict[str, Path]:
        """Version -> the run that trained its adapter; the last one is the default."""
        runs = {"tdm": self.tdm, "tdm-r1": self.tdm_r1}
        return {name: run for name, run in runs.items() if run is not None}


# stage -> what its run must have written
PARTS = {
    "vae": ("vae",),
    "text": ("text_encoder", "tokenizer"),
    "pretrain": ("transformer",),
    "tdm": (ADAPTER_FILE, VERSION_FILE),
    "tdm-r1": (ADAPTER_FILE, VERSION_FILE),
}


def assemble(config: AssembleConfig) -> Path:
    """Writes the checkpoint to the new or empty folder `output`, whole or not at all; returns it.

    A `base` is copied as it is; what the stages trained is written in bfloat16. Raises CheckpointError for a run that
    has not finished, OutputError for an `output` that cannot be written, and what `resolve` does for a base.
    """
    for stage, run in config.runs.items():
        for name in (*_parts(stage, run), CONFIG_FILE, LOG_FILE):
            finished(run / name, stage)
    with new_folder(config.output) as folder, quiet_bars():
        if config.base is None:
            _write(config, folder)
        else:
            extended(config.base, config.adapters, folder)
        for stage, run in config.runs.items():
            _keep_record(run, folder / "training" / stage, list(config.runs.values()))
        forget_paths(folder)
    return config.output


def _parts(stage: str, run: Path) -> tuple[str, ...]:
    """What a run of a stage must have written; one that trained all weights has no adapter."""
    full = (run / FULL_FOLDER).is_dir()
    return tuple(FULL_FOLDER if full and part == ADAPTER_FILE else part for part in PARTS[stage])


def _write(config: AssembleConfig, folder: Path) -> None:
    # half the size; every part is loaded to float32 again, and versions train on the rounded base
    dtype = torch.bfloat16
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(config.vae / "vae", dtype=dtype),
        text_encoder=Qwen3Model.from_pretrained(config.text / "text_encoder", dtype=dtype),
        tokenizer=AutoTokenizer.from_pretrained(config.text / "tokenizer"),
        transformer=ZImageTransformer2DModel.from_pretrained(config.pretrain / "transformer", dtype=dtype),
    ).save_pretrained(folder)
    versions: dict[str, Any] = {"teacher": _teacher(config)}
    for name, run in config.adapters.items():
        adapter = Path("adapters") / f"{name}.safetensors"
        (folder / adapter).parent.mkdir(exist_ok=True)
        shutil.copy2(run / ADAPTER_FILE, folder / adapter)
        versions[name] = json.loads((run / VERSION_FILE).read_text()) | {"adapter": str(adapter)}
    manifest = {
        "format": FORMAT,
        "family": "zimage",
        "limits": LIMITS,
        "default": [*versions][-1],
        "versions": versions,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _teacher(config: AssembleConfig) -> dict[str, Any]:
    return {
        "description": f"The multi-step base, sampled in {config.teacher_steps} guided steps.",
        "adapter": None,
        "sampler": "euler",
        "shift": config.shift,
        "sigmas": list(sigma_grid(config.teacher_steps, config.shift)),
        "guidance": config.teacher_guidance,
        "free_steps": True,
    }


def _keep_record(run: Path, target: Path, stages: Sequence[Path]) -> None:
    """The run's config and loss curve, and those of the run it started from unless that one is a stage of its own."""
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, LOG_FILE):
        shutil.copy2(run / name, target / name)
    start = json.loads((run / CONFIG_FILE).read_text())["config"].get("start")
    if start is not None and Path(start) not in stages:
        _keep_record(Path(start), target / "start", stages)
