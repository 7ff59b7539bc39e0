"""Freed memory is kept, as page faults tell; other settings are respected."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from tdm_serve.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
np.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(1 << 23)  # 64 MB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def faults(mode: str, **extra: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | extra
    answer = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], env=environment, capture_output=True, text=True, check=True
    )
    kept, count = answer.stdout.split()
    return kept == "True", int(count)


def test_blocks_that_are_asked_for_again_cost_no_page_faults() -> None:
    assert faults("leave")[1] > 200  # ten times 64 MB in pages of 2 MB; far more in those of 4 kB
    assert faults("keep") == (True, pytest.approx(0, abs=100))


def test_the_environments_own_settings_win() -> None:
    kept, count = faults("keep", MALLOC_ARENA_MAX="2")
    assert not kept
    assert count > 200
