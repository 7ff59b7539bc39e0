"""From a model reference to a loaded family object, with every file checked first."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tdm_serve.errors import BackendUnavailable, CheckpointError, ConfigError
from tdm_serve.models.catalog import resolve
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.inspect import checkpoint_hash, weight_files
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

FAMILIES = {"zimage": ZImage}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory and the digest of what it was read from."""

    spec: ModelSpec
    model: ZImage
    checkpoint_hash: str


def load(reference: str | Path, device: str, dtype: str) -> Loaded:
    """Reads a checkpoint onto a device. `device` and `dtype` may be "auto"."""
    spec, files = examine(reference)
    target = pick_device(device)
    try:
        with quiet_bars():
            model = FAMILIES[spec.family](spec, target, pick_dtype(dtype, target))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{spec.base} cannot be loaded: {error}") from error
    return Loaded(spec, model, checkpoint_hash(spec, files))


def examine(reference: str | Path) -> tuple[ModelSpec, list[Path]]:
    """What a reference stands for and its weight files, all checked; nothing is loaded."""
    spec = resolve(reference)
    if spec.family not in FAMILIES:
        raise CheckpointError(f"{spec.base} is of family {spec.family!r}; known families are {', '.join(FAMILIES)}")
    return spec, weight_files(spec)


def pick_device(name: str) -> torch.device:
    """For "auto" the first CUDA device where there is one; an explicit device that is absent is an error."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if found is None:
        raise ConfigError(f"device {name!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(found[1] or 0) >= count:
        raise BackendUnavailable(
            f"device {name!r} was asked for, but torch {torch.__version__} sees {count} CUDA devices"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """For "auto" float32 on a CPU, where it is the reference, and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]
