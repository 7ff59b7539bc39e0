"""TensorRT-RTX's builder and ONNX parser, which need no GPU. They come in two wheels, one of them for ONNX Runtime.

The bindings do not find the libraries of the other wheel by themselves, so these are opened first.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tdm_serve.errors import BackendUnavailable, InvalidRequest, MissingExtra

EXTRA = "tensorrt-rtx"
BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
WANTED = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")  # the parser needs the first
HOPPER = "9.0"


@cache
def bindings() -> Any:
    """The module of the bindings. Raises MissingExtra without the wheels, BackendUnavailable where they do not load."""
    folder = _library_folder()
    if folder is None or importlib.util.find_spec(BINDINGS) is None:
        raise MissingExtra("--format tensorrt-rtx", EXTRA)
    try:
        for path in (path for name in WANTED for path in sorted(folder.glob(name))):
            ctypes.CDLL(str(path))
        return import_module(BINDINGS)
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"the TensorRT-RTX libraries in {folder} do not load here: {error}") from error


def _library_folder() -> Path | None:
    """Found without an import, because the package is a plugin of ONNX Runtime and would load CUDA."""
    spec = importlib.util.find_spec(LIBRARIES)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def capabilities(names: tuple[str, ...]) -> tuple[Any, ...]:
    """Compute capabilities such as "8.9" as the library's own values. Raises InvalidRequest for others."""
    known = known_capabilities()
    for name in names:
        if name not in known:
            why = "TensorRT-RTX does not support Hopper" if name == HOPPER else "TensorRT-RTX does not know it"
            raise InvalidRequest(f"--compute-capability has {name!r}: {why}; allowed: {', '.join(known)}")
    if not names:
        raise InvalidRequest(f"--compute-capability names none; allowed: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def known_capabilities() -> dict[str, Any]:
    """By name, smallest first: "8.6" is the library's SM86."""
    members = bindings().ComputeCapability.__members__
    found = {int(name[2:]): value for name, value in members.items() if name.startswith("SM")}
    return {f"{number // 10}.{number % 10}": found[number] for number in sorted(found)}
