"""The one attention of the dense denoisers, and how texts of several lengths share a forward.

Tokens are ordered image, text, batch padding. A row attends its first `kv_len` tokens, and what is computed for the
padding behind them is thrown away, so no boolean mask exists and a row is what it would be alone. What a family attends
as padding of its own, such as Z-Image's learned tokens up to a multiple of 32, counts as text here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_kernels import joint_attention


def attend(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Full attention of q, k, v (B, H, S, D) over the first `kv_len` (B,) int32 keys of each row -> (B, H, S, D).

    Without `kv_len` all keys are attended. On a CPU a row has the bits that it has without padding.
    """
    if kv_len is None and q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v)  # the same bits, without what an operation of our own costs
    return joint_attention(q, k, v, kv_len)


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
