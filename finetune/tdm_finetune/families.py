"""The families' trainees by name, and how a checkpoint finds its own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tdm_finetune.choices import Choices
from tdm_finetune.trainee import Trainee
from tdm_serve.models.load import examine

# family -> what makes it of (spec, weight files, choices, device)
TRAINEES = {
    "zimage": "tdm_finetune.zimage:load",
    "sd3": "tdm_finetune.sd3:SD3Trainee",
    "sd15": "tdm_finetune.plain:SD15Trainee",
    "pixart": "tdm_finetune.plain:PixArtTrainee",
}


def load_trainee(checkpoint: str | Path, choices: Choices, device: torch.device) -> Trainee:
    """From an id or a folder. ConfigError for choices that do not fit; for files it raises as the SDK's loader does."""
    spec, files = examine(checkpoint)
    module, _, name = TRAINEES[spec.family].partition(":")
    made: Any = getattr(import_module(module), name)
    return made(spec, files, choices, device)
