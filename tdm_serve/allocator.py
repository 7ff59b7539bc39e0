"""glibc's allocator, told to keep what is freed.

A network's step frees and asks again for the same gigabytes. By default glibc hands large blocks back to the kernel,
which fills every page with zeros at the next request: on a CPU, small models spend half their time there.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """Serves large blocks from one heap that is never trimmed, for this process; says whether that was done.

    One heap for all threads, since those of threads other than the first are bounded and handed back when empty.
    Another C library is left alone, and so are settings from the environment (`MALLOC_...`).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_ARENA_MAX, 1)])
