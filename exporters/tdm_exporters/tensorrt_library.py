"""NVIDIA TensorRT, which comes in wheels with its libraries or not at all.

Its Python bindings install anywhere, and load only where the libraries (libnvinfer and two more) can be found.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from typing import Any

from tdm_serve.errors import BackendUnavailable, MissingExtra

EXTRA = "tensorrt"
OLDEST = (10, 14)  # the first whose ONNX parser knows Attention


@cache
def bindings() -> Any:
    """The module `tensorrt`. Raises MissingExtra without it, BackendUnavailable where it does not load or is old."""
    try:
        trt = import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise MissingExtra("--format tensorrt", EXTRA) from error
    except ImportError as error:
        raise BackendUnavailable(
            f"TensorRT's bindings are installed, and its libraries are not: {error}; run: pip install 'tensorrt>=10.14'"
        ) from error
    check_version(trt.__version__)
    return trt


def check_version(version: str) -> None:
    """Raises BackendUnavailable for a TensorRT that is too old."""
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        raise BackendUnavailable(f"TensorRT {version} is installed; --format tensorrt needs {OLDEST[0]}.{OLDEST[1]}")


def plugin_module() -> Any:
    """`tensorrt.plugin`, which says on import that it is experimental."""
    bindings()
    return import_module("tensorrt.plugin")


def driver_version() -> int:
    """The CUDA version that the driver speaks, such as 13000. Raises BackendUnavailable without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver is installed here: {error}") from error
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value
