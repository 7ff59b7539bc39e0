"""The public operations `tdm::joint_attention` and `tdm::joint_attention_lse`."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_kernels.attention import backends, naive
from tdm_kernels.attention.choose import choose
from tdm_kernels.attention.launch import launch
from tdm_kernels.checks import (
    check_device,
    check_dtype,
    check_length_values,
    check_lengths,
    check_rows_contiguous,
    check_shape,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Attention without causality over the first `kv_len` keys of each sample.

    q (B, H, S, D), k and v (B, H, T, D) of one dtype, any strides but the last, which is 1; kv_len (B,) int32 within
    [1, T] on the same device, or None for all keys. Returns (B, H, S, D) in token-major memory, that is, its transpose
    to (B, S, H, D) is contiguous. The scale is D ** -0.5.

    TDM_SERVE_ATTENTION chooses who computes it. On the CPU without kv_len it is F.scaled_dot_product_attention to the
    bit. Where a gradient is wanted, it is that function as well, with its own gradient. Raises BadArgument for what it
    does not take, KernelUnavailable where an explicit choice cannot run.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return naive.joint_attention(q, k, v, kv_len)
    return torch.ops.tdm.joint_attention.default(q, k, v, kv_len)


def joint_attention_lse(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`joint_attention` and the natural log-sum-exp of the scaled scores, (B, H, S) float32.

    With it, attentions over parts of the keys can be joined. A sample may have kv_len 0 here: zeros and -inf. Without
    a gradient. Whatever is not Triton computes it by the definition, with all scores in memory.
    """
    return torch.ops.tdm.joint_attention_lse.default(q, k, v, kv_len)


def check(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> None:
    """Raises BadArgument where the tensors do not fit together; looks at no values."""
    tensors = {"q": q, "k": k, "v": v}
    check_dtype(tensors, DTYPES)
    check_device(tensors)
    check_shape("q", q, {"B": None, "H": None, "S": None, "D": None})
    check_shape("k", k, {"B": q.shape[0], "H": q.shape[1], "T": None, "D": q.shape[3]})
    check_shape("v", v, dict(zip("BHTD", k.shape, strict=True)))
    check_rows_contiguous(tensors)
    if kv_len is not None:
        check_lengths("kv_len", kv_len, q.shape[0], q.device)


@torch.library.custom_op("tdm::joint_attention", mutates_args=())
def _joint_attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    check(q, k, v, kv_len)
    if kv_len is not None:
        check_length_values("kv_len", kv_len, 1, k.shape[2])
    choice = choose(q, k, kv_len)
    if choice.backend == "triton":
        return launch(choice.variant, q, k, v, kv_len, want_lse=False)[0]
    if q.device.type == "cpu":
        return token_major(naive.joint_attention(q, k, v, kv_len))
    return token_major(backends.attend(choice.backend, q, k, v, kv_len))


@torch.library.custom_op("tdm::joint_attention_lse", mutates_args=())
def _joint_attention_lse(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check(q, k, v, kv_len)
    if kv_len is not None:
        check_length_values("kv_len", kv_len, 0, k.shape[2])
    choice = choose(q, k, kv_len)
    if choice.backend == "triton":
        out, lse = launch(choice.variant, q, k, v, kv_len, want_lse=True)
        assert lse is not None
        return out, lse
    out, lse = naive.joint_attention_lse(q, k, v, kv_len)
    return token_major(out), lse


@_joint_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    check(q, k, v, kv_len)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


@_joint_attention_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check(q, k, v, kv_len)
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def token_major(x: Tensor) -> Tensor:
    """x (B, H, S, D) with the memory of (B, S, H, D), copied only where it has another one."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
