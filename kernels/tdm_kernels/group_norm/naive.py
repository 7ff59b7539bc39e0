"""What GroupNorm followed by SiLU means, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(group_norm(x)); x (B, C, H, W), weight and bias (C,). Differentiable."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))
