"""compute-sanitizer over every kernel on an NVIDIA GPU. The last file of its kind, because it is slow."""

from __future__ import annotations

import shutil

import pytest

from tests.tdm_kernels.gpu_runs import needs_a_gpu, once, skip_others
from tests.tdm_kernels.launch_once import RUNS

pytestmark = needs_a_gpu()

WITHIN_S = 280  # every access is checked


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_a_kernel_touches_only_its_memory(run: tuple[str, ...], environment: dict[str, str]) -> None:
    skip_others(run)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit on PATH")
    once(environment, run, sanitizer, "--error-exitcode", "1", limit_s=WITHIN_S)
