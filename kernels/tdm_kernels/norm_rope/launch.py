"""Starts the kernels of norm, rotation and quantisation. Triton is imported here, on the first launch."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK

HEAD_DIMS = (32, 64, 128, 256)
ROWS, WARPS = 32, 4  # of `norm_rope`
BLOCK_WARPS = {KEY_BLOCK: 4, QUERY_BLOCK: 8}


Turn = tuple[Tensor | None, Tensor | None]  # cos and sin


def norm_rope(
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    turn: Turn,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q and k (B, S, H, D) normed and turned. Arguments are checked by the caller."""
    batch, tokens, heads, head_dim = q.shape
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    grid = (-(-tokens * heads // ROWS), 2, batch)
    strides = [stride for tensor in (q, k) for stride in tensor.stride()[:3]]
    with torch.cuda.device_of(q):
        _kernels().norm_rope[grid](
            *(q, k, *weights, *turn),
            *strides,
            *(tokens, heads, *out),
            eps=eps,
            HEAD=head_dim,
            ROWS=ROWS,
            INTERLEAVED=interleaved,
            EACH=each(turn),
            num_warps=WARPS,
        )
    return out


def key_mean(k: Tensor, weight: Tensor | None, turn: Turn, kv_len: Tensor | None, **how: Any) -> Tensor:
    """Mean of the valid keys after norm and rotation, (B, H, D) float32. `how` is eps and INTERLEAVED."""
    batch, tokens, heads, head_dim = k.shape
    blocks = -(-tokens // KEY_BLOCK)
    sums = k.new_empty((batch, heads, blocks, head_dim), dtype=torch.float32)
    shape = {"HEAD": head_dim, "BLOCK": KEY_BLOCK, "num_warps": BLOCK_WARPS[KEY_BLOCK]}
    with torch.cuda.device_of(k):
        _kernels().key_sums[blocks, heads, batch](
            *(k, weight, *turn, kv_len, *k.stride()[:3], tokens, heads, sums), EACH=each(turn), **shape, **how
        )
    count = tokens if kv_len is None else kv_len.clamp(min=1)[:, None, None]
    return sums.sum(2) / count


def to_int8(
    x: Tensor,
    weight: Tensor | None,
    turn: Turn,
    mean: Tensor | None,
    kv_len: Tensor | None,
    block: int,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """x (B, S, H, D) as int8 (B, H, S, D) and scales (B, H, blocks)."""
    batch, tokens, heads, head_dim = x.shape
    blocks = -(-tokens // block)
    out = x.new_empty((batch, heads, tokens, head_dim), dtype=torch.int8)
    scales = x.new_empty((batch, heads, blocks), dtype=torch.float32)
    shape = {"HEAD": head_dim, "BLOCK": block, "num_warps": BLOCK_WARPS[block]}
    with torch.cuda.device_of(x):
        _kernels().to_int8[blocks, heads, batch](
            *(x, weight, *turn, mean, kv_len, *x.stride()[:3], tokens, heads, out, scales),
            EACH=each(turn),
            **shape,
            **how,
        )
    return out, scales


def each(turn: Turn) -> bool:
    """Whether every sample has tables of its own."""
    return turn[0] is not None and turn[0].dim() == 3


@cache
def _kernels() -> Any:
    return importlib.import_module("tdm_kernels.norm_rope.triton_kernels")
