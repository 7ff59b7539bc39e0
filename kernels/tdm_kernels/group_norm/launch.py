"""Starts the kernels of GroupNorm and SiLU. Triton is imported here, on the first launch."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

PIXELS = 64  # of a tile; with 128 channels, a tile is 16 KiB of 16-bit values
MOST_CHANNELS = 128  # of a tile, and so of a group
TILES = 1024  # joined at a time
WARPS = 4


def obstacle(x: Tensor, groups: int) -> str | None:
    """Why the kernels cannot take these shapes, or None."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels-last memory; call x.to(memory_format=torch.channels_last) first"
    size = x.shape[1] // groups
    if size > MOST_CHANNELS:
        return f"a group has {size} channels, and it takes at most {MOST_CHANNELS}"
    return None


def launch(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(group_norm(x)) in channels-last memory. Arguments are checked by the caller."""
    batch, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    lanes = 1 << (group - 1).bit_length()
    together = min(groups & -groups, MOST_CHANNELS // lanes)  # groups of a tile: a power of two that divides them
    tiles = -(-pixels // PIXELS)
    partial = x.new_empty((2, batch, groups, tiles), dtype=torch.float32)
    joined = x.new_empty((2, batch, groups), dtype=torch.float32)
    out = torch.empty_like(x)
    shape = {"PIXELS": PIXELS, "CHANNELS": together * lanes, "GROUP": group, "LANES": lanes, "num_warps": WARPS}
    grid = (tiles, groups // together, batch)
    kernels = _kernels()
    with torch.cuda.device_of(x):
        kernels.moments[grid](x, pixels, channels, *partial, **shape)
        sizes = {"PIXELS": PIXELS, "GROUP": group, "TILES": TILES}
        kernels.join[(batch * groups,)](*partial, pixels, tiles, *joined, eps=eps, **sizes)
        kernels.apply[grid](x, weight, bias, *joined, pixels, channels, out, **shape)
    return out


@cache
def _kernels() -> Any:
    return importlib.import_module("tdm_kernels.group_norm.triton_kernels")
