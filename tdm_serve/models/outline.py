"""A module from its configuration alone: parameters have shapes and no memory, buffers have their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import init_empty_weights
from torch import nn

M = TypeVar("M", bound=nn.Module)


def outline(kind: type[M], folder: Path) -> M:
    """Of a class of diffusers or transformers, from the `config.json` in a folder."""
    untyped: Any = kind
    with init_empty_weights(include_buffers=False):
        if hasattr(untyped, "load_config"):
            return untyped.from_config(untyped.load_config(folder))
        module: Any = untyped(untyped.config_class.from_pretrained(folder))
    module.tie_weights()  # taking their memory has parted parameters that are one
    return cast(M, module)
