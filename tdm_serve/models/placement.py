"""Where the parts of a model go, in which types, and where their weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from tdm_serve.errors import ConfigError

Offload = Literal["none", "text"]
Quantise = Literal["none", "fp8"]
OFFLOADS: tuple[Offload, ...] = ("none", "text")
QUANTISATIONS: tuple[Quantise, ...] = ("none", "fp8")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Placement:
    """What a family needs to know to load its parts.

    `text` is the device of the text encoders, and of nothing else: they compute there, in `dtype`, and their features
    are copied to `device`. `fine` is the type in which a network from a file waits for its adapters: no coarser than
    the file and `dtype`. `random` parts are built from their configurations, on their device and in `dtype` at once.
    """

    device: torch.device
    dtype: torch.dtype
    text: torch.device
    fine: torch.dtype
    quantise: Quantise = "none"
    random: bool = False

    def part(self, kind: type[M], folder: Path, device: torch.device) -> M:
        """One part of a diffusers folder, on a device, for inference."""
        if self.random:
            from tdm_serve.models.random_weights import build

            return build(kind, folder, device, self.dtype)
        return placed(cast(Any, kind).from_pretrained(folder, dtype=self.dtype), device)

    def network(self, kind: type[M], folder: Path) -> M:
        """A denoiser, to which adapters can be added: on the CPU and in `fine`, unless it is random."""
        if self.random:
            return self.part(kind, folder, self.device)
        read: Any = cast(Any, kind).from_pretrained(folder, dtype=self.fine)
        return read.eval().requires_grad_(False)


def placed(module: M, device: torch.device) -> M:
    """On its device, for inference. Generic: diffusers' and transformers' own `to` are declared without parameters."""
    return module.to(device).eval().requires_grad_(False)


def placement_on(device: torch.device, dtype: torch.dtype) -> Placement:
    """Everything on one device, from files of any type."""
    return Placement(device, dtype, text=device, fine=torch.float32)


def check_offload(name: str) -> Offload:
    """One of `OFFLOADS`; raises ConfigError."""
    if name not in OFFLOADS:
        raise ConfigError(f"offload is {name!r}; it must be {' or '.join(OFFLOADS)}")
    return name


def check_quantise(name: str) -> Quantise:
    """One of `QUANTISATIONS`; raises ConfigError."""
    if name not in QUANTISATIONS:
        raise ConfigError(f"quantise is {name!r}; it must be {' or '.join(QUANTISATIONS)}")
    return name
