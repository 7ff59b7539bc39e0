"""LoRA adapters in diffusers' file format: reading, checking, fusing into a base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tdm_serve.errors import CheckpointError

PREFIX = "transformer."
UNREAD = ("alpha_pattern", "rank_pattern", "use_rslora")  # PEFT settings that would change the scale
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the PEFT config of a LoRA file


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter adds to one linear: scale * B A, with A (r, in), B (out, r) and scale alpha / r."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight (out, in) with the adapter in it, summed in float32 and rounded once to the weight's own type."""
        a, b = (factor.to(weight.device, torch.float32) for factor in (self.a, self.b))
        return (weight.float() + self.scale * (b @ a)).to(weight.dtype)


def read_adapters(path: Path, prefix: str = PREFIX) -> dict[str, Lora]:
    """Module name -> adapter, of a LoRA file whose keys begin with `prefix`."""
    pairs, scale = read_lora(path, prefix)
    return {name: Lora(a, b, scale) for name, (a, b) in pairs.items()}


def adapted_names(path: Path) -> set[str]:
    """Names of the modules that a LoRA file changes, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {_module_name(key, path, PREFIX) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {path} cannot be read: {error}") from error


def read_lora(path: Path, prefix: str = PREFIX) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(module name -> (A (r, in), B (out, r)), alpha / r) of a LoRA file; the scale travels in its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {path} cannot be read: {error}") from error
    names = sorted({_module_name(key, path, prefix) for key in tensors})
    pairs = {name: _pair(tensors, name, path, prefix) for name in names}
    if not pairs:
        raise CheckpointError(f"adapter {path} holds no LoRA weights")
    return pairs, _scale(metadata, pairs, path, prefix)


def _module_name(key: str, path: Path, prefix: str) -> str:
    for ending in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(prefix) and key.endswith(ending):
            return key.removeprefix(prefix).removesuffix(ending)
    raise CheckpointError(f"adapter {path} holds {key!r}, which is no {prefix}*.lora_A or lora_B weight")


def _pair(tensors: Mapping[str, Tensor], name: str, path: Path, prefix: str) -> tuple[Tensor, Tensor]:
    try:
        return tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"]
    except KeyError as error:
        raise CheckpointError(f"adapter {path} lacks {error}") from error


def _scale(metadata: Mapping[str, str], pairs: Mapping[str, tuple[Tensor, Tensor]], path: Path, prefix: str) -> float:
    """alpha / r from the file's metadata; without metadata alpha equals r, as diffusers assumes."""
    rank = next(iter(pairs.values()))[0].shape[0]
    try:
        settings: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
        alpha = float(settings.get(f"{prefix}lora_alpha", rank))
        unread = [key for key in UNREAD if settings.get(prefix + key)]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"adapter {path} has unusable metadata: {error!r}") from error
    if unread or any(a.shape[0] != rank or b.shape[1] != rank for a, b in pairs.values()):
        raise CheckpointError(
            f"adapter {path} scales its modules differently ({', '.join(unread) or 'several ranks'}); "
            "one rank and one alpha for all are read"
        )
    return alpha / rank


def check_fits(path: Path, name: str, lora: Lora, shape: Sequence[int]) -> None:
    """Raises CheckpointError unless an adapter has the shape (out, in) of the weight it changes."""
    if lora.shape != tuple(shape):
        raise CheckpointError(f"adapter {path} changes {name} by {lora.shape}, but the base has {tuple(shape)}")


@torch.no_grad()
def fuse_lora(model: nn.Module, path: Path, prefix: str = PREFIX) -> int:
    """Adds alpha / r * B A to each named linear of `model`, in float32; returns how many modules changed."""
    adapters = read_adapters(path, prefix)
    for name, lora in adapters.items():
        try:
            weight = model.get_parameter(f"{name}.weight")
        except AttributeError as error:
            raise CheckpointError(f"adapter {path} names {name}, which the base does not have") from error
        check_fits(path, name, lora, weight.shape)
        weight.copy_(lora.added_to(weight))
    return len(adapters)
