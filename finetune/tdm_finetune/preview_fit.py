"""Fits the linear map from latents to colours that previews use, and stores it in a checkpoint's manifest.

The manifest is not part of the checkpoint's hash, so recipes and feedback that name the hash stay valid.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdm_finetune.cache import Frozen
from tdm_finetune.data import chunks, examples, to_tensor
from tdm_serve.config import at_least
from tdm_serve.errors import CheckpointError
from tdm_serve.files import write_atomically
from tdm_serve.models.spec import MANIFEST
from tdm_serve.preview import Matrix, fit, picture

logger = logging.getLogger(__name__)

CHUNK = 64
HELD_BACK = 64  # scenes on which the map is judged


@dataclass(frozen=True, slots=True)
class PreviewConfig:
    """`tdm-serve finetune preview`."""

    checkpoint: Path = Path("runs/checkpoint")
    scenes: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "scenes")


def train(config: PreviewConfig) -> Path:
    """Fits, writes the manifest atomically, and returns its path."""
    path = config.checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{config.checkpoint} is no checkpoint: {MANIFEST} is missing")
    frozen = Frozen.load(config.checkpoint / "vae", config.checkpoint)
    matrix = fit_scenes(frozen, config.scenes, config.seed)
    logger.info("previews differ from pictures by %.1f of 255 (root mean square)", error(frozen, matrix, config.seed))
    write_matrix(path, matrix)
    return path


def fit_scenes(frozen: Frozen, scenes: int, seed: int) -> Matrix:
    """The map that is best on true pictures of `scenes` training scenes."""
    pictures = _pictures(scenes, seed)
    return fit(_latents(frozen, pictures), (pictures + 1.0) * 127.5)


def error(frozen: Frozen, matrix: Matrix, seed: int) -> float:
    """Root mean square difference, in 8-bit values, of previews from pictures that the fit did not see."""
    pictures = _pictures(HELD_BACK, seed + 1)
    shown = [picture(latents, matrix, frozen.factor) for latents in _latents(frozen, pictures).split(1)]
    there = torch.from_numpy(np.stack([np.asarray(image) for image in shown])).permute(0, 3, 1, 2)
    return float((there - (pictures + 1.0) * 127.5).square().mean().sqrt())


def write_matrix(path: Path, matrix: Matrix) -> None:
    """Sets `preview.matrix` of a manifest; whatever else it holds stays."""
    manifest = json.loads(path.read_text())
    manifest["preview"] = {"matrix": matrix}
    write_atomically(path, (json.dumps(manifest, indent=1) + "\n").encode())


def _pictures(count: int, seed: int) -> Tensor:
    """(count, 3, H, W) in [-1, 1]."""
    return to_tensor([pixels for _, pixels in islice(examples(seed), count)])


def _latents(frozen: Frozen, pictures: Tensor) -> Tensor:
    parts = chunks(list(pictures), CHUNK)
    return torch.cat([frozen.to_latents(torch.stack(list(part))) for part in parts])
