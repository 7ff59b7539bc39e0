"""Whether Triton runs an operation here: TDM_SERVE_KERNELS=auto|triton|torch. (Attention has its own variable.)

TDM_SERVE_ATTENTION=quantised insists on Triton for the quantised operations, whatever TDM_SERVE_KERNELS says.

`triton` raises where it cannot run and says why; `auto`, the default, takes Triton where the committed `measured.json`
says that it was faster on this device, and torch everywhere else. What it took is logged once.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tdm_kernels.checks import spell
from tdm_kernels.errors import KernelUnavailable

VARIABLE = "TDM_SERVE_KERNELS"
BACKENDS = ("triton", "torch")
ATTENTION = "TDM_SERVE_ATTENTION"
ATTENTIONS = ("triton", "cudnn", "flash", "sdpa", "quantised")
QUANTISED = ("quantise_qk", "quantised_attention")
HALF = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)
MEASURED = Path(__file__).with_name("measured.json")

log = logging.getLogger(__name__)


def asked(variable: str, backends: Sequence[str]) -> str:
    """What the environment asks for, "auto" without a word. Raises KernelUnavailable for what does not exist."""
    choice = os.environ.get(variable, "auto")
    if choice not in ("auto", *backends):
        raise KernelUnavailable(f"{variable} is {choice!r}; allowed: auto, {', '.join(backends)}")
    return choice


def quantises() -> bool:
    """Whether attention is to be quantised: an approximation, so only on an explicit word."""
    return asked(ATTENTION, ATTENTIONS) == "quantised"


def takes_triton(operation: str, x: Tensor, obstacle: str | None) -> bool:
    """Whether Triton runs `operation` on `x`. `obstacle` is why it could not, or None."""
    if insistence := _insistence(operation):
        if obstacle:
            raise KernelUnavailable(f"{insistence} cannot run {operation}: {obstacle}")
        return True
    if asked(VARIABLE, BACKENDS) == "torch" or x.device.type != "cuda":
        return False
    faster = measured(operation, x.device)
    if faster and obstacle:
        _say_once(operation, x.device, "torch", f"triton is faster but cannot run here: {obstacle}")
        return False
    why = "it was measured as faster" if faster else "triton was not measured as faster on it"
    _say_once(operation, x.device, "triton" if faster else "torch", why)
    return faster


def _insistence(operation: str) -> str | None:
    """The setting that wants `operation` run by Triton and by nothing else, or None."""
    if operation in QUANTISED and quantises():
        return f"{ATTENTION}=quantised"
    return f"{VARIABLE}=triton" if asked(VARIABLE, BACKENDS) == "triton" else None


def triton_obstacle(x: Tensor, dtypes: Sequence[torch.dtype], oldest: tuple[int, int] = OLDEST) -> str | None:
    """Why Triton cannot run on tensors like `x`, or None."""
    if not triton_installed():
        return "triton is not installed; run: pip install 'tdm-serve[kernels]'"
    if interpreted():
        return None
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, and it needs a CUDA device"
    if x.dtype not in dtypes:
        return f"the dtype is {spell([x.dtype])}, and it takes {spell(dtypes)}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if (major, minor) < oldest:
        return f"the device has compute capability {major}.{minor}, and it needs {oldest[0]}.{oldest[1]} or newer"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, which tests use."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def measured(operation: str, device: torch.device) -> bool:
    """Whether the kernel of that name was measured as the fastest on such a device."""
    return device.type == "cuda" and (operation, torch.cuda.get_device_name(device)) in _measured()


@cache
def _measured() -> frozenset[tuple[str, str]]:
    """Operations and devices on which Triton won."""
    rows = json.loads(MEASURED.read_text())["faster"]
    return frozenset((row["operation"], row["device"]) for row in rows)


@cache
def _say_once(operation: str, device: torch.device, backend: str, why: str) -> None:
    log.info("%s on %s runs on %s: %s", operation, device, backend, why)
