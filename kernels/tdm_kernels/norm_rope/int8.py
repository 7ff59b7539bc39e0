"""The public operation `tdm::quantise_qk`: queries and keys as int8, normed and turned on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdm_kernels.checks import check_length_values, check_lengths
from tdm_kernels.dispatch import takes_triton
from tdm_kernels.norm_rope import launch, naive
from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK
from tdm_kernels.norm_rope.ops import check, obstacle


class Int8(NamedTuple):
    """Queries and keys (B, H, S, D) int8, and the scales (B, H, blocks) float32 of their blocks of tokens."""

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor


def quantise_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    kv_len: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> Int8:
    """`qk_norm_rope` of q and k (B, S, H, D), and the result as int8 in head-major memory for `quantised_attention`.

    Blocks of 128 queries and of 64 keys share a scale. The mean of a head's valid keys is taken off the keys first,
    which changes no softmax and leaves more of int8 to what differs. Keys behind kv_len (B,) int32 are zero. Without a
    gradient. Raises as `qk_norm_rope` does.
    """
    return Int8(*torch.ops.tdm.quantise_qk.default(q, k, q_weight, k_weight, cos, sin, kv_len, eps, interleaved))


@torch.library.custom_op("tdm::quantise_qk", mutates_args=())
def _quantise_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_len: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(q, k, q_weight, k_weight, cos, sin)
    if kv_len is not None:
        check_lengths("kv_len", kv_len, q.shape[0], q.device)
        check_length_values("kv_len", kv_len, 1, k.shape[1])
    if takes_triton("quantise_qk", q, obstacle(q)):
        turn = (cos, sin)
        how = {"eps": eps, "INTERLEAVED": interleaved}
        mean = launch.key_mean(k, k_weight, turn, kv_len, **how)
        queries = launch.to_int8(q, q_weight, turn, None, None, QUERY_BLOCK, **how)
        return *queries, *launch.to_int8(k, k_weight, turn, mean, kv_len, KEY_BLOCK, **how)
    query = naive.norm_rope(q.float(), q_weight, cos, sin, eps, interleaved)
    key = naive.norm_rope(k.float(), k_weight, cos, sin, eps, interleaved)
    smooth = naive.keep_valid(key - naive.mean_key(key, kv_len), kv_len)
    return *naive.blocks_to_int8(query, QUERY_BLOCK), *naive.blocks_to_int8(smooth, KEY_BLOCK)


@_quantise_qk.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kv_len: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del eps, interleaved  # change no shape
    check(q, k, q_weight, k_weight, cos, sin)
    if kv_len is not None:
        check_lengths("kv_len", kv_len, q.shape[0], q.device)
    batch, tokens, heads, head_dim = q.shape
    whole = q.new_empty((batch, heads, tokens, head_dim), dtype=torch.int8)
    scales = [
        q.new_empty((batch, heads, (tokens + block - 1) // block), dtype=torch.float32)
        for block in (QUERY_BLOCK, KEY_BLOCK)
    ]
    return whole, scales[0], torch.empty_like(whole), scales[1]
