"""Starts the attention kernels. Triton is imported here, on the first launch."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tdm_kernels.attention.variants import VARIANTS, Variant, default

TMA_ALIGNMENT = 16  # bytes; base addresses and all strides but the last


def launch(
    name: str, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Runs variant `name`; out (B, H, S, D) in token-major memory, and the log-sum-exp (B, H, S) if wanted.

    Arguments are checked by the caller. Tensors that TMA cannot address take the default pointer variant.
    """
    variant = VARIANTS[name]
    if variant.loads == "tma":
        if all(addressable(tensor) for tensor in (q, k, v)):
            provide_scratch()
        else:
            variant = VARIANTS[default(q.shape[-1], torch.cuda.get_device_capability(q.device))]
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)  # (B, H, S, D)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if want_lse else None
    run(variant, q, k, v, kv_len, out, lse)
    return out, lse


def run(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, out: Tensor, lse: Tensor | None
) -> None:
    """Fills `out` and, if given, `lse`."""
    batch, heads, lines, head_dim = q.shape
    grid = (-(-lines // variant.rows), heads, batch)
    strides = [stride for tensor in (q, k, v, out) for stride in tensor.stride()[:3]]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _kernel(variant.loads)[grid](
            *(q, k, v, kv_len),
            *strides,
            *(lines, k.shape[2], heads, out, lse),
            HEAD=head_dim,
            ROWS=variant.rows,
            KEYS=variant.keys,
            num_warps=variant.warps,
            num_stages=variant.stages,
        )


def addressable(tensor: Tensor) -> bool:
    """Whether TMA can read `tensor`: base and strides are multiples of 16 bytes."""
    steps = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
    return tensor.data_ptr() % TMA_ALIGNMENT == 0 and all(step % TMA_ALIGNMENT == 0 for step in steps)


@cache
def _kernel(loads: str) -> Any:
    return importlib.import_module(f"tdm_kernels.attention.triton_{loads}").attention


def provide_scratch() -> None:
    """Descriptors that a kernel makes live in global memory, for which Triton asks an allocator of the thread."""
    import triton

    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    assert alignment <= 512, "torch aligns to 512 bytes"
    assert stream is None or stream == torch.cuda.current_stream().cuda_stream, "torch's allocator follows its stream"
    return torch.empty(size, dtype=torch.int8, device="cuda")
