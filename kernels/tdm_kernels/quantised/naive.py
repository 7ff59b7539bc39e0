"""What quantised attention means, in plain torch: the attention of what the integers and scales stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_kernels.attention import naive
from tdm_kernels.norm_rope.int8 import Int8
from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK

FP8 = torch.float8_e4m3fn
FP8_TOP = 448.0
SMALLEST = 1e-12
ROW = 16  # bytes, so that TMA can address the rows


def restore(whole: Tensor, scale: Tensor, block: int) -> Tensor:
    """int8 (B, H, S, D) and scales (B, H, blocks) as float32."""
    return whole.float() * scale.repeat_interleave(block, dim=2)[:, :, : whole.shape[2], None]


def quantise_values(v: Tensor, kv_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """v (B, H, T, D) as fp8 (e4m3) and one scale for each channel, (B, H, D) float32.

    The memory is (B, H, D, T'), with T' the next multiple of ROW, and zeros behind T.
    """
    wide = v.float()
    if kv_len is not None:
        valid = torch.arange(v.shape[2], device=v.device) < kv_len.unsqueeze(1)  # (B, T)
        wide = torch.where(valid[:, None, :, None], wide, 0.0)
    scale = wide.abs().amax(2).clamp(min=SMALLEST * FP8_TOP) / FP8_TOP
    keys = v.shape[2]
    rows = F.pad((wide / scale.unsqueeze(2)).transpose(-1, -2), (0, -keys % ROW))  # (B, H, D, T')
    return rows.contiguous().to(FP8)[..., :keys].transpose(-1, -2), scale


def quantised_attention(
    qk: Int8, v: Tensor, v_scale: Tensor | None, kv_len: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Attention of the restored tensors, in float32."""
    q, k = restore(qk.q, qk.q_scale, QUERY_BLOCK), restore(qk.k, qk.k_scale, KEY_BLOCK)
    value = v.float() if v_scale is None else v.float() * v_scale.unsqueeze(2)
    return naive.joint_attention(q, k, value, kv_len).to(dtype)
