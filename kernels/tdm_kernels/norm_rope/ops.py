"""The public operation `tdm::qk_norm_rope`, and the checks that it shares with the quantising one."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_kernels.checks import check_device, check_dtype, check_rows_contiguous, check_shape
from tdm_kernels.dispatch import HALF, takes_triton, triton_obstacle
from tdm_kernels.errors import BadArgument
from tdm_kernels.norm_rope import launch, naive

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_DTYPES = (*HALF, torch.float32)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """RMS-norm of queries and keys over their channels, then their rotary embedding, rounded once.

    q and k (B, S, H, D), any strides but the last, which is 1. Weights (D,) of the same dtype, both or none: without
    them nothing is normed. cos and sin float32, (S, D / 2), or (B, S, D / 2) where each sample has its own, both or
    none: without them nothing turns. `interleaved` pairs channels (2i, 2i + 1), as Z-Image does; otherwise
    (i, i + D / 2). Returns both, contiguous.

    TDM_SERVE_KERNELS chooses who computes it; where a gradient is wanted, torch. Raises BadArgument, and
    KernelUnavailable where an explicit choice cannot run.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, q_weight, k_weight)):
        check(q, k, q_weight, k_weight, cos, sin)
        pairs = ((q, q_weight), (k, k_weight))
        query, key = (naive.norm_rope(x, weight, cos, sin, eps, interleaved) for x, weight in pairs)
        return query, key
    return torch.ops.tdm.qk_norm_rope.default(q, k, q_weight, k_weight, cos, sin, eps, interleaved)


def check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Raises BadArgument where the tensors do not fit together."""
    named = {"q": q, "k": k}
    check_shape("q", q, {"B": None, "S": None, "H": None, "D": None})
    check_shape("k", k, dict(zip("BSHD", q.shape, strict=True)))
    if (q_weight is None) != (k_weight is None) or (cos is None) != (sin is None):
        raise BadArgument("one of a pair is missing; q_weight and k_weight, and cos and sin, come both or not at all")
    if q_weight is not None and k_weight is not None:
        named |= {"q_weight": q_weight, "k_weight": k_weight}
        check_shape("q_weight", q_weight, {"D": q.shape[3]})
        check_shape("k_weight", k_weight, {"D": q.shape[3]})
    check_dtype(named, DTYPES)
    check_rows_contiguous(named)
    if cos is not None and sin is not None:
        check_turn(q, cos, sin)
        named |= {"cos": cos, "sin": sin}
    check_device(named)


def check_turn(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos and sin fit q."""
    if q.shape[3] % 2:
        raise BadArgument(f"q has {q.shape[3]} channels; a rotation needs an even number")
    turn = {"cos": cos, "sin": sin}
    check_dtype(turn, (torch.float32, torch.float64))
    for name, tensor in turn.items():
        own = {"B": q.shape[0]} if cos.dim() == 3 else {}
        check_shape(name, tensor, {**own, "S": q.shape[1], "D / 2": q.shape[3] // 2})
        if not tensor.is_contiguous():
            raise BadArgument(f"{name} has strides {tuple(tensor.stride())}; call .contiguous() first")


def obstacle(q: Tensor) -> str | None:
    """Why the kernels cannot take tensors like `q`, or None."""
    if q.shape[3] not in launch.HEAD_DIMS:
        return f"the head dimension is {q.shape[3]}, and it takes {', '.join(map(str, launch.HEAD_DIMS))}"
    return triton_obstacle(q, TRITON_DTYPES)


@torch.library.custom_op("tdm::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    check(q, k, q_weight, k_weight, cos, sin)
    if takes_triton("qk_norm_rope", q, obstacle(q)):
        return launch.norm_rope(q, k, (q_weight, k_weight), (cos, sin), eps, interleaved)
    pairs = ((q, q_weight), (k, k_weight))
    query, key = (fresh(naive.norm_rope(x, weight, cos, sin, eps, interleaved), x) for x, weight in pairs)
    return query, key


@_qk_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    del eps, interleaved  # change no shape
    check(q, k, q_weight, k_weight, cos, sin)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def fresh(result: Tensor, source: Tensor) -> Tensor:
    """`result` contiguous and of its own memory: an operation must not return its argument."""
    return result.clone() if result is source else result.contiguous()
