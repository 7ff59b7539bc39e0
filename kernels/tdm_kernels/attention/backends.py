"""torch's own attention backends, named explicitly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdm_kernels.errors import KernelUnavailable

REFUSALS = ("No available kernel", "No viable backend")  # how torch says that it cannot
NAMED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> Tensor:
    """`backend` is cudnn, flash or sdpa. Padding behind kv_len is masked here, so it must hold finite numbers."""
    mask = None if kv_len is None else mask_of(kv_len, k.shape[2])
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, mask)
    try:
        with sdpa_kernel([NAMED[backend]]):
            return F.scaled_dot_product_attention(q, k, v, mask)
    except RuntimeError as error:
        if not str(error).startswith(REFUSALS):
            raise
        raise KernelUnavailable(
            f"torch's {backend} attention refuses queries {tuple(q.shape)} of {q.dtype} on {q.device}"
        ) from error


def mask_of(kv_len: Tensor, keys: int) -> Tensor:
    """(B, 1, 1, keys) bool: which keys exist."""
    return (torch.arange(keys, device=kv_len.device) < kv_len.unsqueeze(1))[:, None, None]
