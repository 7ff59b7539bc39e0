"""Eight-bit weights for a denoiser's linear layers, through torchao: half the memory of bfloat16.

Every row of a weight becomes float8 (e4m3) with a scale of its own. On a GPU that has fp8 units (compute capability
8.9 and up) the inputs are rounded to fp8 on the fly, too, so that the products run there; on a CPU the weights alone
are stored in fp8. What the network is sensitive to, and what is small or runs once a prompt, keeps its type.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tdm_serve.errors import BackendUnavailable, ConfigError, MissingExtra

M = TypeVar("M", bound=nn.Module)

OLDEST = (8, 9)  # compute capability with fp8 products: Ada, Hopper and later
STEP = 16  # features that fp8 products come in

# By family: linears that keep their type, in diffusers' names and in those of the denoisers here. They are embedders,
# what makes modulation of the time, the last layer, and what sees the text alone.
KEPT: Mapping[str, str] = {
    "zimage": r"embed|^time\.|final|odulation|context_refiner|text_blocks",
    "sd3": r"embed|^time\.|norm|odulation|^proj_out$|^out$",
    "sd15": r"time_emb|proj_in|proj_out|attn2\.to_[kv]",
    "pixart": r"pos_embed|adaln_single|caption_projection|proj_out|attn2\.to_[kv]",
}


def is_quantised(family: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether fp8 takes a linear, by its name and the shape (out, in) of its weight."""
    fits = len(shape) == 2 and all(side % STEP == 0 for side in shape)
    return fits and re.search(KEPT[family], name) is None


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises MissingExtra, BackendUnavailable or ConfigError where fp8 cannot be had."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtra("quantise fp8", "fp8")
    if device.type != "cuda":
        return
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        name = torch.cuda.get_device_name(device)
        raise BackendUnavailable(
            f"quantise fp8 needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later, and {name} has "
            f"{found[0]}.{found[1]}; leave quantise out"
        )
    if dtype != torch.bfloat16:
        found_dtype = str(dtype).removeprefix("torch.")
        raise ConfigError(f"quantise fp8 on a GPU needs dtype bfloat16; dtype is {found_dtype}")


def linears(denoiser: nn.Module, family: str) -> Iterator[tuple[str, nn.Linear]]:
    """What fp8 takes of a denoiser."""
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and is_quantised(family, name, tuple(module.weight.shape)):
            yield name, module


def to_fp8(denoiser: M, family: str, device: torch.device) -> M:
    """Quantises in place, one layer at a time on `device`, where the denoiser is afterwards."""
    torchao: Any = importlib.import_module("torchao.quantization")  # optional, so no type checker can look inside
    if device.type == "cuda":
        config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    else:
        config = torchao.Float8WeightOnlyConfig()
    for _, module in list(linears(denoiser, family)):
        torchao.quantize_(module.to(device), config)
    return denoiser.to(device)
