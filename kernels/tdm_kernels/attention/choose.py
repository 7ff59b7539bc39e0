"""Which backend runs a call: TDM_SERVE_ATTENTION=auto|triton|cudnn|flash|sdpa|quantised.

An explicit choice that cannot run raises and says why. `auto`, the default, takes what the committed table measured as
fastest for the device and shape; where nothing was measured it takes `sdpa`, torch's own choice, and says so once. With
`quantised`, networks hand what they can to `quantised_attention`; what still comes here is chosen as by `auto`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tdm_kernels.attention import table, variants
from tdm_kernels.checks import spell
from tdm_kernels.dispatch import ATTENTION as VARIABLE
from tdm_kernels.dispatch import ATTENTIONS as CHOICES
from tdm_kernels.dispatch import BACKENDS as KERNELS
from tdm_kernels.dispatch import HALF, OLDEST, asked, interpreted, triton_obstacle
from tdm_kernels.dispatch import VARIABLE as KERNELS_VARIABLE
from tdm_kernels.errors import KernelUnavailable

BACKENDS = ("triton", "cudnn", "flash", "sdpa")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend and, where that is "triton", the variant of the kernel."""

    backend: str
    variant: str = ""


def choose(q: Tensor, k: Tensor, kv_len: Tensor | None) -> Choice:
    """The backend for a call. Raises KernelUnavailable where an explicit one cannot run it."""
    wanted = asked(VARIABLE, CHOICES)
    if wanted not in ("auto", "quantised"):
        if reason := obstacle(wanted, q, kv_len is not None):
            raise KernelUnavailable(f"{VARIABLE}={wanted} cannot run this attention: {reason}")
        return Choice(wanted, _variant(q, k, kv_len) if wanted == "triton" else "")
    if q.device.type != "cuda":
        return Choice("sdpa")
    row = table.lookup(_shape(q, k, kv_len))
    choice = Choice("sdpa") if row is None else Choice(row.backend, row.variant or "")
    why = "this shape was not measured on it" if row is None else "the committed table says so"
    if reason := obstacle(choice.backend, q, kv_len is not None):
        choice, why = Choice("sdpa"), f"{choice.backend} is faster but cannot run here: {reason}"
    _say_once(q.device, q.shape[-1], choice, why)
    return choice


def check_choices(device: torch.device) -> None:
    """Raises KernelUnavailable where the environment asks for what does not exist or cannot run on `device` at all.

    What depends on dtype and shape shows at the first call.
    """
    for variable, backends, anywhere in ((VARIABLE, CHOICES, "sdpa"), (KERNELS_VARIABLE, KERNELS, "torch")):
        wanted = asked(variable, backends)
        if wanted not in ("auto", anywhere) and device.type != "cuda" and not interpreted():
            raise KernelUnavailable(
                f"{variable}={wanted} needs a CUDA device, but the model is on {device}; "
                f"allowed there: auto, {anywhere}"
            )


def obstacle(backend: str, q: Tensor, ragged: bool) -> str | None:
    """Why `backend` cannot run queries like `q`, or None. `ragged`: there is a `kv_len`."""
    if backend == "sdpa":
        return None
    if backend == "triton":
        return _triton_obstacle(q)
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}, and it needs a CUDA device"
    if q.dtype not in HALF:
        return f"the dtype is {spell([q.dtype])}, and it takes {spell(HALF)}"
    if backend == "flash" and ragged:
        return "torch's flash attention has no masks, so it cannot take kv_len"
    return None


def _triton_obstacle(q: Tensor) -> str | None:
    if q.shape[-1] not in variants.HEAD_DIMS:
        return f"the head dimension is {q.shape[-1]}, and it takes {' or '.join(map(str, variants.HEAD_DIMS))}"
    return triton_obstacle(q, HALF)


def _shape(q: Tensor, k: Tensor, kv_len: Tensor | None) -> table.Shape:
    name = torch.cuda.get_device_name(q.device)
    return table.Shape(name, q.shape[-1], k.shape[2], q.shape[0] * q.shape[1], kv_len is not None)


def _variant(q: Tensor, k: Tensor, kv_len: Tensor | None) -> str:
    """The variant for an explicit `triton`: the table's if it holds one, else the device's default."""
    if interpreted():
        return variants.default(q.shape[-1], OLDEST)
    row = table.lookup(_shape(q, k, kv_len))
    if row is not None and row.variant:
        return row.variant
    return variants.default(q.shape[-1], torch.cuda.get_device_capability(q.device))


@cache
def _say_once(device: torch.device, head_dim: int, choice: Choice, why: str) -> None:
    what = f"{choice.backend} {choice.variant}".strip()
    log.info("attention with head dimension %d on %s runs on %s: %s", head_dim, device, what, why)
