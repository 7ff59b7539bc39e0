"""What joint attention means, in plain torch: the definition of correct, and the implementation on the CPU.

A sample attends its own first `kv_len` keys exactly as if it were alone and unpadded, so padding may hold anything and
a picture does not depend on what it is batched with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the first `kv_len` keys of each sample, (B, H, S, D). Differentiable."""
    if kv_len is None:
        return F.scaled_dot_product_attention(q, k, v)
    samples = [
        F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1, :, :length], v[i : i + 1, :, :length])
        for i, length in enumerate(kv_len.tolist())
    ]
    return torch.cat(samples)


def joint_attention_lse(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As above, and log(sum(exp(q k^T / sqrt(D)))) of each query in float32, (B, H, S).

    A sample without keys gives zeros and -inf, so that parts of one attention can be joined.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, S, T)
    values = v.to(wide)
    if kv_len is not None:
        missing = torch.arange(k.shape[2], device=k.device) >= kv_len.unsqueeze(1)  # (B, T)
        scores = scores.masked_fill(missing[:, None, None], float("-inf"))
        values = values.masked_fill(missing[:, None, :, None], 0.0)  # 0 * NaN would be NaN
    sums = scores.logsumexp(-1)
    weights = (scores - sums.masked_fill(sums.isneginf(), 0.0).unsqueeze(-1)).exp()
    return (weights @ values).to(q.dtype), sums.float()
