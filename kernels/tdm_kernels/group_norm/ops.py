"""The public operation `tdm::group_norm_silu`."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_kernels.checks import check_device, check_dtype, check_shape
from tdm_kernels.dispatch import HALF, takes_triton, triton_obstacle
from tdm_kernels.errors import BadArgument
from tdm_kernels.group_norm import naive
from tdm_kernels.group_norm.launch import launch
from tdm_kernels.group_norm.launch import obstacle as shape_obstacle

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_DTYPES = (*HALF, torch.float32)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """silu(group_norm(x)): x (B, C, H, W), weight and bias (C,) of x's dtype; the result has x's memory format.

    The kernels take channels-last memory and groups of up to 128 channels; TDM_SERVE_KERNELS chooses. Where a
    gradient is wanted, it is torch's own. Raises BadArgument; KernelUnavailable where an explicit choice cannot run.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return naive.group_norm_silu(x, weight, bias, groups, eps)
    return torch.ops.tdm.group_norm_silu.default(x, weight, bias, groups, eps)


def check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    """Raises BadArgument where the arguments do not fit together."""
    tensors = {"x": x, "weight": weight, "bias": bias}
    check_dtype(tensors, DTYPES)
    check_device(tensors)
    check_shape("x", x, {"B": None, "C": None, "H": None, "W": None})
    check_shape("weight", weight, {"C": x.shape[1]})
    check_shape("bias", bias, {"C": x.shape[1]})
    if groups < 1 or x.shape[1] % groups:
        raise BadArgument(f"groups is {groups}; it must divide the {x.shape[1]} channels of x")


def obstacle(x: Tensor, groups: int) -> str | None:
    """Why the kernels cannot take `x`, or None."""
    return triton_obstacle(x, TRITON_DTYPES) or shape_obstacle(x, groups)


@torch.library.custom_op("tdm::group_norm_silu", mutates_args=())
def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    check(x, weight, bias, groups)
    if takes_triton("group_norm_silu", x, obstacle(x, groups)):
        return launch(x, weight.contiguous(), bias.contiguous(), groups, eps)
    out = naive.group_norm_silu(x, weight, bias, groups, eps)
    like = torch.empty_like(x)
    return out if out.stride() == like.stride() else like.copy_(out)


@_group_norm_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    del eps  # changes no shape
    check(x, weight, bias, groups)
    return torch.empty_like(x)
