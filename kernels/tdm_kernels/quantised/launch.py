"""Starts the kernels of quantised attention. Triton is imported here, on the first launch."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_kernels.attention.launch import addressable, provide_scratch
from tdm_kernels.norm_rope.int8 import Int8
from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK

Loads = Literal["pointer", "tma"]
HEAD_DIMS = (64, 128)
FP8_OLDEST = (8, 9)  # the first cards with fp8 products


def plan(loads: Loads, fp8: bool) -> dict[str, int]:
    """Warps and stages that fit every card without spilling, as the compile tests show."""
    if loads == "tma":
        return {"num_warps": 4, "num_stages": 3}
    return {"num_warps": 8, "num_stages": 2 if fp8 else 3}


def launch(
    loads: Loads, qk: Int8, v: Tensor, v_scale: Tensor | None, kv_len: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Attention (B, H, S, D) in token-major memory. Tensors that TMA cannot address are loaded by pointers."""
    batch, heads, lines, head_dim = qk.q.shape
    fp8 = v_scale is not None
    stored = v.transpose(-1, -2) if fp8 else v
    if loads == "tma":
        if addressable(stored):
            provide_scratch()
        else:
            loads = "pointer"
    out = v.new_empty((batch, lines, heads, head_dim), dtype=dtype).transpose(1, 2)
    with torch.cuda.device_of(v):
        _kernel(loads)[-(-lines // QUERY_BLOCK), heads, batch](
            *(*qk, v, v_scale, kv_len),
            *(*stored.stride()[:3], *out.stride()[:3]),
            *(lines, qk.k.shape[2], heads, out),
            HEAD=head_dim,
            ROWS=QUERY_BLOCK,
            KEYS=KEY_BLOCK,
            **plan(loads, fp8),
        )
    return out


@cache
def _kernel(loads: Loads) -> Any:
    return importlib.import_module(f"tdm_kernels.quantised.triton_{loads}").attention
