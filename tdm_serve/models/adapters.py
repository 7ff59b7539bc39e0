"""LoRA adapters in diffusers' file format: reading, checking, fusing into a base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tdm_serve.errors import CheckpointError

PREFIX = "transformer."
UNREAD = ("alpha_pattern", "rank_pattern", "use_rslora")  # PEFT settings that would change the scale
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the PEFT config of a LoRA file


def read_lora(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(module name -> (A (r, in), B (out, r)), alpha / r) of a LoRA file; the scale travels in its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {path} cannot be read: {error}") from error
    pairs = {name: _pair(tensors, name, path) for name in sorted({_module_name(key, path) for key in tensors})}
    if not pairs:
        raise CheckpointError(f"adapter {path} holds no LoRA weights")
    return pairs, _scale(metadata, pairs, path)


def _module_name(key: str, path: Path) -> str:
    for ending in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(PREFIX) and key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending)
    raise CheckpointError(f"adapter {path} holds {key!r}, which is no {PREFIX}*.lora_A or lora_B weight")


def _pair(tensors: Mapping[str, Tensor], name: str, path: Path) -> tuple[Tensor, Tensor]:
    try:
        return tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]
    except KeyError as error:
        raise CheckpointError(f"adapter {path} lacks {error}") from error


def _scale(metadata: Mapping[str, str], pairs: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> float:
    """alpha / r from the file's metadata; without metadata alpha equals r, as diffusers assumes."""
    rank = next(iter(pairs.values()))[0].shape[0]
    try:
        settings: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
        alpha = float(settings.get(f"{PREFIX}lora_alpha", rank))
        unread = [key for key in UNREAD if settings.get(PREFIX + key)]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"adapter {path} has unusable metadata: {error!r}") from error
    if unread or any(a.shape[0] != rank or b.shape[1] != rank for a, b in pairs.values()):
        raise CheckpointError(
            f"adapter {path} scales its modules differently ({', '.join(unread) or 'several ranks'}); "
            "one rank and one alpha for all are read"
        )
    return alpha / rank


@torch.no_grad()
def fuse_lora(model: nn.Module, path: Path) -> int:
    """Adds alpha / r * B A to each named linear of `model`, in float32; returns how many modules changed."""
    pairs, scale = read_lora(path)
    for name, (a, b) in pairs.items():
        try:
            weight = model.get_parameter(f"{name}.weight")
        except AttributeError as error:
            raise CheckpointError(f"adapter {path} names {name}, which the base does not have") from error
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise CheckpointError(
                f"adapter {path} changes {name} by {(b.shape[0], a.shape[1])}, but the base has {tuple(weight.shape)}"
            )
        delta = scale * (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32))
        weight.copy_((weight.float() + delta).to(weight.dtype))
    return len(pairs)
