"""The one attention of the dense denoisers, and how texts of several lengths share a forward.

Tokens are ordered image, text, batch padding. A row attends its first `kv_len` tokens, and what is computed for the
padding behind them is thrown away, so no boolean mask exists and a row is what it would be alone. What a family attends
as padding of its own, such as Z-Image's learned tokens up to a multiple of 32, counts as text here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_kernels import joint_attention, qk_norm_rope, quantise_qk, quantise_values, quantised_attention
from tdm_serve.models.kernel_choice import HeadPath


def attend(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Full attention of q, k, v (B, H, S, D) over the first `kv_len` (B,) int32 keys of each row -> (B, H, S, D).

    Without `kv_len` all keys are attended. On a CPU a row has the bits that it has without padding.
    """
    if kv_len is None and q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v)  # the same bits, without what an operation of our own costs
    return joint_attention(q, k, v, kv_len)


def normed_heads(
    q: Tensor, k: Tensor, norms: tuple[nn.Module, nn.Module], turn: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """q and k (B, S, H, D) through their RMS-norms and, by `turn`, their rotation, as one kernel.

    `turn` is cos and sin, (S, 1, D / 2), or (B, S, 1, D / 2) where rows differ.
    """
    q_weight, k_weight, eps = _parameters(norms, q)
    return qk_norm_rope(q, k, q_weight, k_weight, *_tables(turn), eps=eps)


def attend_normed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: tuple[nn.Module, nn.Module],
    turn: tuple[Tensor, Tensor],
    kv_len: Tensor | None,
    path: HeadPath,
) -> Tensor:
    """`normed_heads` of q and k, and their attention with v (B, S, H, D) over the first `kv_len` keys: (B, H, S, D).

    Quantised by `path`: q and k as int8 where they are normed, v as `path` says.
    """
    values = v.transpose(1, 2)
    if path == "fused":
        q, k = normed_heads(q, k, norms, turn)
        return attend(q.transpose(1, 2), k.transpose(1, 2), values, kv_len)
    q_weight, k_weight, eps = _parameters(norms, q)
    whole = quantise_qk(q, k, q_weight, k_weight, *_tables(turn), kv_len, eps=eps)
    held, scale = quantise_values(values, kv_len) if path == "fp8" else (values, None)
    return quantised_attention(whole, held, scale, kv_len, dtype=q.dtype)


def _parameters(norms: tuple[nn.Module, nn.Module], like: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both weights in `like`'s type, and the eps that they share."""
    first, second = norms
    assert first.eps == second.eps, "one eps for queries and keys"
    query, key = (cast(Tensor, norm.weight).to(like.dtype) for norm in norms)
    return query, key, cast(float, first.eps)


def _tables(turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """As kernels take them: without the dimension of heads, and without gaps, which rows' cuts to a picture have."""
    return (None, None) if turn is None else (turn[0].squeeze(-2).contiguous(), turn[1].squeeze(-2).contiguous())


def ragged(texts: Sequence[Tensor], own: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Texts (1, L_i, D) as one batch (B, L, D), and their int32 lengths (B,), or None where all are equally long.

    `own` are the lengths in tokens; rows of a text behind them, such as SD3's pooled embedding, stay the last rows.
    """
    widest = max(own)
    if all(n == widest for n in own):
        return torch.cat(list(texts)), None
    padded = [
        torch.cat((text[:, :n], text.new_zeros(1, widest - n, text.shape[-1]), text[:, n:]), dim=1)
        for text, n in zip(texts, own, strict=True)
    ]
    return torch.cat(padded), torch.tensor(own, dtype=torch.int32, device=texts[0].device)
