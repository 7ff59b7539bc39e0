"""Tests that run kernels in Triton's interpreter, in a process of their own with TRITON_INTERPRET=1.

A process that interprets cannot compile and the other way round, so `test_interpreted.py` starts pytest on each file
here, and the ordinary run collects nothing of this folder. To run them by hand:

    TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/tdm_kernels/interpreted
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every tensor that a kernel should fill holds NaN, or the largest integer, before it does."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def repairs(request: pytest.FixtureRequest) -> Iterator[None]:
    """See repaired_interpreter.py. The module that shows the defects says PLAIN_INTERPRETER = True."""
    if getattr(request.module, "PLAIN_INTERPRETER", False):
        yield
        return
    from tests.tdm_kernels.interpreted.repaired_interpreter import repaired_interpreter

    with repaired_interpreter():
        yield
