"""Tests that need an NVIDIA GPU, and kernels that run in processes which can be killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdm_kernels.attention import variants

HANGS_AFTER_S = 120


def needs_a_gpu() -> list[pytest.MarkDecorator]:
    """For a module's `pytestmark`."""
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        pytest.mark.timeout(300, method="thread"),  # a signal does not end a hanging kernel
    ]


def fits(name: str, head_dim: int) -> None:
    if name not in variants.fitting(head_dim, torch.cuda.get_device_capability()):
        pytest.skip(f"{name} is not for this card")


def skip_others(run: tuple[str, ...]) -> None:
    what, how, size = run
    if what == "attention":
        fits(how, int(size))
    if (what, how) == ("quantised", "tma") and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("TMA kernels are for 9.0")


def once(environment: dict[str, str], run: tuple[str, ...], *before: str, limit_s: int = HANGS_AFTER_S) -> None:
    """Fails where the launch is wrong or takes so long that it must be hanging."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "tests.tdm_kernels.launch_once", *run],
        cwd=Path(__file__).parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
