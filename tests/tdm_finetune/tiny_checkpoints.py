"""A tiny checkpoint of every family: the folders of `tests.tdm_serve.tiny_folders` with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tdm_serve.models.spec import FORMAT, MANIFEST
from tdm_serve.sampling import sigma_grid
from tests.tdm_serve import tiny_folders

LIMITS = {"width": 64, "height": 64, "size_multiple": 16, "min_side": 32, "max_side": 192, "max_prompt_tokens": 32}
FLOW = {"sampler": "euler", "shift": 3.0, "sigmas": sigma_grid(6, 3.0)}
TIMES = [899.0, 749.0, 599.0, 449.0, 299.0, 149.0]
DDIM = {"sampler": "ddim", "shift": 1.0, "times": TIMES, "sigmas": []}


@dataclass(frozen=True)
class Kind:
    """How a folder is made, and what its manifest says."""

    make: Callable[[Path], Path]
    family: str
    version: dict[str, Any]
    process: dict[str, Any]
    trained: int  # modules that get a LoRA
    guidance: float = 2.0  # of the teacher


BETAS = {"start": 0.00085, "end": 0.012, "schedule": "scaled_linear"}
KINDS = {
    "zimage": Kind(tiny_folders.zimage, "zimage", FLOW, {}, 28),
    "sd35": Kind(tiny_folders.sd3, "sd3", FLOW, {}, 3 * 8 - 1),
    "sd3-without-t5": Kind(lambda at: tiny_folders.sd3(at, t5=False, dual=False), "sd3", FLOW, {}, 3 * 8 - 1),
    "sd15": Kind(tiny_folders.sd15, "sd15", DDIM, {"prediction": "epsilon", "betas": BETAS}, 4 * 10, 20.0),
    "pixart": Kind(
        tiny_folders.pixart, "pixart", DDIM, {"prediction": "epsilon", "betas": {"start": 1e-4, "end": 0.02}}, 2 * 10
    ),
}


def checkpoint(kind: str, folder: Path) -> Path:
    """The folder of a kind as a checkpoint whose only version is a guided multi-step teacher."""
    with torch.random.fork_rng(devices=[]):
        KINDS[kind].make(folder)
    version = KINDS[kind].version | {"description": "tiny", "adapter": None, "guidance": KINDS[kind].guidance}
    manifest = {"format": FORMAT, "family": KINDS[kind].family, "limits": LIMITS, **KINDS[kind].process}
    described = manifest | {"versions": {"teacher": version}, "default": "teacher"}
    (folder / MANIFEST).write_text(json.dumps(described))
    return folder
