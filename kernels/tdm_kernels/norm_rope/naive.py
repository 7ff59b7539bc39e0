"""What norm, rotation and quantisation of queries and keys mean, in plain torch. All tensors are (B, S, H, D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 128, 64  # tokens that share a scale
TOP = 127.0
SMALLEST = 1e-12  # the scale of a block of zeros


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns pairs of channels by the angles of their token; cos and sin (S, D / 2), or (B, S, D / 2).

    Pair i is channels (2i, 2i + 1) where interleaved, as complex numbers lie, and (i, i + D / 2) otherwise.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., S, 1, D / 2)
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = (one * cos - other * sin, one * sin + other * cos)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> Tensor:
    """RMS-norm over channels, then the rotation, rounded once at the end. Each is left out where it has no tensors."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if weight is not None:
        wide = F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps)
    if cos is not None and sin is not None:
        wide = rotate(wide, cos.to(wide.dtype), sin.to(wide.dtype), interleaved)
    return wide.to(x.dtype)


def mean_key(k: Tensor, kv_len: Tensor | None) -> Tensor:
    """Mean of the valid keys, (B, 1, H, D). Taking it off all keys adds one constant to all scores of a query."""
    if kv_len is None:
        return k.mean(1, keepdim=True)
    return keep_valid(k, kv_len).sum(1, keepdim=True) / kv_len.clamp(min=1)[:, None, None, None]


def keep_valid(x: Tensor, kv_len: Tensor | None) -> Tensor:
    """x (B, S, H, D) with zeros behind kv_len, whatever was there."""
    if kv_len is None:
        return x
    valid = torch.arange(x.shape[1], device=x.device) < kv_len.unsqueeze(1)  # (B, S)
    return torch.where(valid[:, :, None, None], x, 0.0)


def blocks_to_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x (B, S, H, D) -> int8 (B, H, S, D) and scales (B, H, ceil(S / block)) with x = int8 * scale, nearly."""
    x = x.transpose(1, 2).float()
    tokens = x.shape[2]
    count = -(-tokens // block)
    padded = F.pad(x, (0, 0, 0, count * block - tokens)).unflatten(2, (count, block))  # (B, H, N, block, D)
    scale = padded.abs().amax((-2, -1)).clamp(min=SMALLEST * TOP) / TOP
    whole = torch.floor(padded / scale[..., None, None] + 0.5).clamp(-TOP, TOP).to(torch.int8)
    return whole.flatten(2, 3)[:, :, :tokens].contiguous(), scale
