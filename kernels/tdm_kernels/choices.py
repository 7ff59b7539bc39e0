"""Whether a network calls an operation at all: asked when it is loaded, with an empty tensor of the kind it will pass.

A network keeps its plain layers where the answer is no, so nothing changes where nothing was chosen: no bit, and no
cost. Each answer follows TDM_SERVE_KERNELS (TDM_SERVE_ATTENTION for attention) and raises KernelUnavailable where an
explicit choice cannot run tensors of this kind.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tdm_kernels.dispatch import interpreted, quantises, takes_triton
from tdm_kernels.group_norm import ops as group_norm
from tdm_kernels.norm_rope import ops as norm_rope
from tdm_kernels.quantised import ops as quantised
from tdm_kernels.quantised.launch import FP8_OLDEST

Values = Literal["16-bit", "fp8"]


def group_norm_silu(x: Tensor, groups: int) -> bool:
    """Whether Triton will run it on tensors like `x` (B, C, H, W), which are in channels-last memory."""
    return takes_triton("group_norm_silu", x, group_norm.obstacle(x, groups))


def qk_norm_rope(q: Tensor) -> bool:
    """Whether Triton will run it on tensors like `q` (B, S, H, D)."""
    return takes_triton("qk_norm_rope", q, norm_rope.obstacle(q))


def quantised_attention(v: Tensor) -> Values | None:
    """How values like `v` (B, H, S, D) are held where TDM_SERVE_ATTENTION=quantised: fp8 on cards that multiply it.

    None where it says something else: attention is only quantised on an explicit word, however fast it was measured.
    """
    if not quantises():
        return None
    takes_triton("quantised_attention", v, quantised.obstacle(v))  # or raises
    fp8 = not interpreted() and torch.cuda.get_device_capability(v.device) >= FP8_OLDEST
    return "fp8" if fp8 else "16-bit"
