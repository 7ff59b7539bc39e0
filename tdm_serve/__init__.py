"""tdm-serve: text-to-image in four network evaluations.

The names below are loaded on first use, so that `import tdm_serve` and `tdm-serve --help` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdm_serve.async_engine import AsyncEngine
    from tdm_serve.core import GeneratedImage, ModelInfo, Request, StepEvent
    from tdm_serve.errors import TdmServeError
    from tdm_serve.pipeline import Pipeline

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "async_engine",
    "GeneratedImage": "core",
    "ModelInfo": "core",
    "Pipeline": "pipeline",
    "Request": "core",
    "StepEvent": "core",
    "TdmServeError": "errors",
}

__all__ = ["AsyncEngine", "GeneratedImage", "ModelInfo", "Pipeline", "Request", "StepEvent", "TdmServeError"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tdm_serve' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tdm_serve.{_HOMES[name]}"), name)
