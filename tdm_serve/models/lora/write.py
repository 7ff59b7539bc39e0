"""Writes an adapter as the one file that stock diffusers' `load_lora_weights` takes.

Stock takes alpha from the file's metadata, and without metadata as the rank. So alpha either travels in the metadata,
for diffusers versions that read it, or is folded into B, for every loader.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tdm_serve.files import write_atomically
from tdm_serve.models.lora.core import Lora
from tdm_serve.models.lora.files import METADATA_KEY


def write_lora(
    lora: Lora,
    path: Path,
    component: str = "transformer",
    *,
    fold_alpha: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes `path`, whole or not at all, and returns it. `component` is "unet" for pipelines that have one.

    Folding multiplies B by alpha / r in float32 and rounds it to its type again.
    """
    tensors: dict[str, Tensor] = {}
    for name, delta in sorted(lora.modules.items()):
        b = (delta.b.float() * delta.scale).to(delta.b.dtype) if fold_alpha else delta.b
        for side, factor in (("A", delta.a), ("B", b)):
            tensors[f"{component}.{name}.lora_{side}.weight"] = factor.detach().cpu().to(dtype or factor.dtype)
    metadata = {"format": "pt"}
    if not fold_alpha:
        described = {f"{component}.{key}": value for key, value in _config(lora).items()}
        metadata[METADATA_KEY] = json.dumps(described, sort_keys=True)
    write_atomically(path, save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata))
    return path


def _config(lora: Lora) -> dict[str, Any]:
    """As PEFT's LoraConfig: what most modules have, and the others by name."""
    ranks = {name: delta.rank for name, delta in lora.modules.items()}
    alphas = {name: _tidy(delta.scale * delta.rank) for name, delta in lora.modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(lora.modules)}
    patterns = {"rank_pattern": _others(ranks, rank), "alpha_pattern": _others(alphas, alpha)}
    return config | {key: value for key, value in patterns.items() if value}


def _others(values: dict[str, float] | dict[str, int], usual: float) -> dict[str, float]:
    """`^`, because PEFT's patterns match the ends of names, and one name can be the end of another."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _tidy(alpha: float) -> float | int:
    """The alpha that was divided by the rank, without the rounding of doing so."""
    rounded = round(alpha, 9)
    return int(rounded) if rounded == int(rounded) else rounded
