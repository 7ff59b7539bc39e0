"""A version's adapters, read and checked against its base, as one; and how they get into the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from tdm_serve.models.lora import Base, Lora, Stated, base_of, combined, read_lora
from tdm_serve.models.spec import Adapter

logger = logging.getLogger(__name__)


def read_adapters(adapters: Sequence[Adapter], base: Base) -> Lora | None:
    """What a version adds to its base, of several adapters the sum; None for the base itself."""
    if not adapters:
        return None
    loras = [
        (read_lora(one.path, base, one.format, Stated(one.rank, one.alpha, one.targets)), one.scale) for one in adapters
    ]
    for warning in dict.fromkeys(warning for lora, _ in loras for warning in lora.warnings):
        logger.warning("%s", warning)
    return combined(loras)


@torch.no_grad()
def fuse_adapters(model: nn.Module, adapters: Sequence[Adapter], name: str = "the model") -> int:
    """Adds alpha / r * B A to each adapted weight of `model`, in float32; returns how many weights changed."""
    lora = read_adapters(adapters, base_of(model, name))
    if lora is None:
        return 0
    for module, delta in lora.modules.items():
        weight = model.get_parameter(f"{module}.weight")
        weight.copy_(delta.added_to(weight))
    return len(lora.modules)
