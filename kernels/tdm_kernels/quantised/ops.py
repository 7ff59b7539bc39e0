"""The public operation `tdm::quantised_attention`, and values for it."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_kernels.attention.ops import token_major
from tdm_kernels.checks import (
    check_device,
    check_dtype,
    check_length_values,
    check_lengths,
    check_shape,
    spell,
)
from tdm_kernels.dispatch import HALF, OLDEST, measured, takes_triton, triton_obstacle
from tdm_kernels.errors import BadArgument
from tdm_kernels.norm_rope.int8 import Int8
from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK
from tdm_kernels.quantised import naive
from tdm_kernels.quantised.launch import FP8_OLDEST, HEAD_DIMS, launch
from tdm_kernels.quantised.naive import FP8

VALUES = (*HALF, torch.float32, FP8)
OUTPUTS = (*HALF, torch.float32)
NAME, TMA = "quantised_attention", "quantised_attention (tma)"


def quantise_values(v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """v (B, H, T, D) as fp8 (e4m3) for `quantised_attention`, and a scale for each channel, (B, H, D) float32.

    The keys of a channel lie together, in rows of a multiple of 16. Values behind kv_len (B,) int32 become zero.
    """
    check_dtype({"v": v}, OUTPUTS)
    check_shape("v", v, {"B": None, "H": None, "T": None, "D": None})
    if kv_len is not None:
        check_lengths("kv_len", kv_len, v.shape[0], v.device)
    return naive.quantise_values(v, kv_len)


def quantised_attention(
    qk: Int8,
    v: Tensor,
    v_scale: Tensor | None = None,
    kv_len: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention without causality of int8 queries and keys from `quantise_qk`, over each sample's first kv_len keys.

    v (B, H, T, D) is 16 bits wide with rows without gaps, or what `quantise_values` gives, with its v_scale; fp8 runs
    on cards from 8.9 on. kv_len (B,) int32 within [1, T], or None. Returns (B, H, S, D) of `dtype`, which is v's unless
    given, in token-major memory. Without a gradient.

    TDM_SERVE_KERNELS chooses who computes it; torch restores float32 and keeps all scores in memory. Raises
    BadArgument, and KernelUnavailable where an explicit choice cannot run.
    """
    wanted = dtype or (torch.bfloat16 if v.dtype == FP8 else v.dtype)
    return torch.ops.tdm.quantised_attention.default(*qk, v, v_scale, kv_len, wanted)


def check(qk: Int8, v: Tensor, v_scale: Tensor | None, kv_len: Tensor | None, dtype: torch.dtype) -> None:
    """Raises BadArgument where the tensors do not fit together."""
    check_integers(qk)
    batch, heads, keys, channels = qk.k.shape
    check_dtype({"v": v}, VALUES)
    check_shape("v", v, {"B": batch, "H": heads, "T": keys, "D": channels})
    if dtype not in OUTPUTS:
        raise BadArgument(f"dtype is {spell([dtype])}; allowed: {spell(OUTPUTS)}")
    named = {"q": qk.q, "k": qk.k, "q_scale": qk.q_scale, "k_scale": qk.k_scale, "v": v}
    if (v.dtype == FP8) != (v_scale is not None):
        given = "missing" if v_scale is None else "given"
        raise BadArgument(f"v is {spell([v.dtype])} and v_scale is {given}; fp8 values have a scale, others have none")
    if v_scale is not None:
        named |= {"v_scale": v_scale}
        check_dtype({"v_scale": v_scale}, (torch.float32,))
        check_shape("v_scale", v_scale, {"B": batch, "H": heads, "D": channels})
    axis, source = (-1, "call .contiguous() first") if v_scale is None else (-2, "take them from quantise_values")
    if v.stride(axis) != 1 and v.shape[axis] > 1:
        raise BadArgument(f"v has strides {tuple(v.stride())}; stride {axis} must be 1, so {source}")
    check_device(named)
    if kv_len is not None:
        check_lengths("kv_len", kv_len, batch, v.device)


def check_integers(qk: Int8) -> None:
    """Queries, keys and their scales are what quantise_qk gives."""
    check_dtype({"q": qk.q, "k": qk.k}, (torch.int8,))
    check_dtype({"q_scale": qk.q_scale, "k_scale": qk.k_scale}, (torch.float32,))
    check_shape("q", qk.q, {"B": None, "H": None, "S": None, "D": None})
    check_shape("k", qk.k, {"B": qk.q.shape[0], "H": qk.q.shape[1], "T": None, "D": qk.q.shape[3]})
    for name, whole, scale, block in (("q", qk.q, qk.q_scale, QUERY_BLOCK), ("k", qk.k, qk.k_scale, KEY_BLOCK)):
        blocks = (whole.shape[2] + block - 1) // block
        check_shape(f"{name}_scale", scale, {"B": whole.shape[0], "H": whole.shape[1], "blocks": blocks})
        if not (whole.is_contiguous() and scale.is_contiguous()):
            raise BadArgument(f"{name} or its scale has gaps or another order in memory; take both from quantise_qk")


def obstacle(v: Tensor) -> str | None:
    """Why the kernels cannot take values like `v`, or None."""
    if v.shape[-1] not in HEAD_DIMS:
        return f"the head dimension is {v.shape[-1]}, and it takes {' or '.join(map(str, HEAD_DIMS))}"
    fp8 = v.dtype == FP8
    return triton_obstacle(v, (FP8, *HALF), FP8_OLDEST if fp8 else OLDEST)


@torch.library.custom_op("tdm::quantised_attention", mutates_args=())
def _quantised_attention(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    kv_len: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    qk = Int8(q, q_scale, k, k_scale)
    check(qk, v, v_scale, kv_len, dtype)
    if kv_len is not None:
        check_length_values("kv_len", kv_len, 1, k.shape[2])
    if takes_triton(NAME, v, obstacle(v)):
        scale = None if v_scale is None else v_scale.contiguous()
        return launch("tma" if measured(TMA, v.device) else "pointer", qk, v, scale, kv_len, dtype)
    return token_major(naive.quantised_attention(qk, v, v_scale, kv_len, dtype))


@_quantised_attention.register_fake
def _(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    kv_len: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    check(Int8(q, q_scale, k, k_scale), v, v_scale, kv_len, dtype)
    return v.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), dtype=dtype).transpose(1, 2)
