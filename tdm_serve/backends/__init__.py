"""Ways to run a denoiser. One name, one creator, imported when chosen."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from tdm_serve.artifact import read_artifact
from tdm_serve.backends.base import Denoise, needs_engine
from tdm_serve.errors import ConfigError
from tdm_serve.models.catalog import Reference
from tdm_serve.models.load import Loaded

logger = logging.getLogger(__name__)

ONNX, PT2 = "tdm_serve.backends.onnx", "tdm_serve.backends.pt2"
EXPORTED = {"onnx": ONNX, "onnx-cpu": ONNX, "onnx-cuda": ONNX, "onnx-tensorrt": ONNX, "pt2": PT2}
CREATORS = {"compiled": "tdm_serve.backends.compiled", "eager": "tdm_serve.backends.eager", **EXPORTED}


def create(name: str, denoiser: nn.Module) -> Denoise:
    """The backend called `name`; only "auto" may choose, and it says what it took and why."""
    if name == "auto":
        logger.info("backend auto: eager, which needs no warm-up; ask for `compiled` to trade start-up for speed")
        name = "eager"
    if name not in CREATORS:
        raise ConfigError(f"backend {name!r} is unknown; choose auto, {', '.join(CREATORS)}")
    return importlib.import_module(CREATORS[name]).create(denoiser)


def check_choice(name: str, engine: Path | None) -> None:
    """Raises ConfigError unless a backend and an exported engine's folder go together."""
    if engine is None and name in EXPORTED:
        raise needs_engine(name)
    if engine is not None and name != "auto" and name not in EXPORTED:
        raise ConfigError(
            f"backend {name!r} does not run the exported engine {engine}; choose auto or {', '.join(EXPORTED)}"
        )


def load_exported(
    models: Reference | Sequence[Reference], engine: Path, backend: str, device: str, dtype: str
) -> tuple[Loaded, str]:
    """An engine's folder, opened, and the backend that "auto" stands for. See `backends.exported`."""
    if not read_artifact(engine).report:
        logger.warning("%s was exported without verification: nobody compared its pictures with eager's", engine)
    return importlib.import_module("tdm_serve.backends.exported").load_exported(models, engine, backend, device, dtype)
