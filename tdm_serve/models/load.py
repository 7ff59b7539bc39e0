"""From a model reference to a loaded family object, with every file checked first."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from tdm_kernels import KernelUnavailable, check_choices
from tdm_serve.errors import BackendUnavailable, CheckpointError, ConfigError
from tdm_serve.files import sha256
from tdm_serve.models.catalog import Reference, resolve
from tdm_serve.models.families.base import Family
from tdm_serve.models.families.table import FAMILIES, INDEX, detect
from tdm_serve.models.inspect import adapter_files, checkpoint_hash, encoder_hash, weight_files
from tdm_serve.models.memory import Wish, bound, free_on, place
from tdm_serve.models.placement import Placement, check_offload, check_quantise
from tdm_serve.models.quantise import check_fp8
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.random_weights import random_specs
from tdm_serve.models.sizes import sizes_of
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MemoryOptions(TypedDict, total=False):
    """How a model is made to fit, and whether its weights matter.

    `offload` of "text" keeps text encoders on the host. `quantise` of "fp8" stores the network's linears in eight bits.
    `max_memory_gb` bounds what the model may take on its device. `random_weights` builds a catalogue id at full size
    without a download; its pictures are noise.
    """

    offload: str
    quantise: str
    max_memory_gb: float | None
    random_weights: bool


@dataclass(frozen=True, slots=True)
class Served:
    """One version that can be asked for, and the digest of everything its pictures depend on."""

    spec: ModelSpec
    checkpoint_hash: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base in memory and its versions, of which the first is the default."""

    model: Family
    served: tuple[Served, ...]
    encoder_hash: str
    growing: bool = False  # versions may join


def check_unused(memory: MemoryOptions, why: str) -> None:
    """Raises ConfigError where any of the options asks for something."""
    asked = [name for name, value in memory.items() if value not in (None, False, "none")]
    if asked:
        raise ConfigError(f"{', '.join(asked)} cannot be chosen here: {why}")


def load(
    references: Reference | Sequence[Reference],
    device: str = "auto",
    dtype: str = "auto",
    adapters: str = "fused",
    *,
    growing: bool = False,
    **memory: Unpack[MemoryOptions],
) -> Loaded:
    """Reads a checkpoint, or several versions of one base, onto a device. `device` and `dtype` may be "auto".

    The base is read and checked once, whatever the number of versions. `adapters` is how several versions keep what
    they do not share: "fused" as whole weights, which is faster, or "separate" as thin matrices, which is smaller.
    `growing` keeps the base apart from its versions even where there is one, so that others can join (`join`).
    Raises ConfigError before anything is loaded where it would not fit (`tdm_serve.models.memory`).
    """
    names = [references] if isinstance(references, str | Path | ModelSpec) else [*dict.fromkeys(_named(references))]
    if not names:
        raise ConfigError("no model was named; name at least one")
    if adapters != "fused" and adapters != "separate":  # noqa: PLR1714 - narrows the type
        raise ConfigError(f"adapters is {adapters!r}; it must be fused or separate")
    target = pick_device(device)
    try:
        check_choices(target)
    except KernelUnavailable as error:
        raise BackendUnavailable(str(error)) from error
    wish = _wish(target, dtype, memory)
    if wish.random:
        with random_specs([str(name) for name in names]) as specs:
            return _loaded(specs, [], wish, adapters, growing, memory.get("max_memory_gb"))
    spec, files = examine(names[0])
    specs = [spec, *(_of_same_base(resolve(name), spec) for name in names[1:])]
    if len({one.id for one in specs}) < len(specs):
        raise ConfigError(f"of {', '.join(one.id for one in specs)} one id is twice; give one another +name=")
    return _loaded(specs, files, wish, adapters, growing, memory.get("max_memory_gb"))


def _wish(device: torch.device, dtype: str, memory: MemoryOptions) -> Wish:
    """The options, checked."""
    wish = Wish(
        device,
        pick_dtype(dtype, device),
        check_offload(memory.get("offload", "none")),
        check_quantise(memory.get("quantise", "none")),
        memory.get("random_weights", False),
    )
    if wish.quantise == "fp8":
        check_fp8(device, wish.dtype)
    return wish


def _loaded(
    specs: Sequence[ModelSpec],
    files: Sequence[Path],
    wish: Wish,
    adapters: Adapters,
    growing: bool,
    max_memory_gb: float | None,
) -> Loaded:
    """Versions of one base, of which the first one's files are `files`."""
    spec = specs[0]
    if (growing or len(specs) > 1) and not FAMILIES[spec.family].shares:
        raise ConfigError(
            f"family {spec.family!r} serves one version of a base at a time; {len(specs)} were named"
            f"{', and others were to join' if growing else ''}"
        )
    if adapters == "separate" and not FAMILIES[spec.family].shares:
        able = ", ".join(name for name, entry in FAMILIES.items() if entry.shares)
        raise ConfigError(
            f'family {spec.family!r} adds adapters to its weights; adapters "separate" is for {able} only'
        )
    if wish.quantise != "none" and (growing or len(specs) > 1) and adapters == "fused":
        raise ConfigError('several versions of a quantised base need adapters="separate"; "fused" adds to its weights')
    placement = _placement(spec, wish, any(one.adapters for one in specs), max_memory_gb)
    own_files = adapter_files(spec)
    base, digest = [path for path in files if path not in own_files], cache(sha256)
    own = [[*base, *adapter_files(one)] for one in specs]
    try:
        with quiet_bars():
            versions = [*specs, _bare(spec)] if growing else specs
            model = FAMILIES[spec.family].create()(versions, placement, adapters)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{spec.base} cannot be loaded: {error}") from error
    served = (Served(one, checkpoint_hash(one, paths, digest)) for one, paths in zip(specs, own, strict=True))
    return Loaded(model, tuple(served), encoder_hash(spec, digest), growing)


def _placement(spec: ModelSpec, wish: Wish, adapted: bool, max_memory_gb: float | None) -> Placement:
    """Where the parts go; refused where they do not fit."""
    sizes = sizes_of(spec.base, spec.family, random=wish.random)
    asked = replace(wish, adapters=adapted, pixels=spec.width * spec.height)
    placement = place(spec.id, sizes, asked, free_on(wish.device), max_memory_gb)
    bound(wish.device, max_memory_gb)
    return placement


def _bare(spec: ModelSpec) -> ModelSpec:
    """The base as a version that nobody can ask for: with it in the company, no adapter goes into the base weights."""
    return replace(spec, id="", adapters=())


def join(spec: ModelSpec, first: ModelSpec) -> Served:
    """A version that is to join those of the base of `first`, its files checked and hashed. Takes a while.

    Its folder may be another one that links to the base's files. Raises CheckpointError, or ConfigError for a version
    of another base.
    """
    if not (spec.base / INDEX).exists() or (spec.base / INDEX).resolve() != (first.base / INDEX).resolve():
        _of_same_base(spec, first)
    return Served(replace(spec, base=first.base), checkpoint_hash(spec, weight_files(spec)))


def _named(references: Sequence[Reference]) -> list[str | ModelSpec]:
    return [one if isinstance(one, ModelSpec) else str(one) for one in references]


def _of_same_base(spec: ModelSpec, first: ModelSpec) -> ModelSpec:
    if spec.base.resolve() != first.base.resolve():
        raise ConfigError(
            f"{spec.id} is a version of {spec.base} and {first.id} one of {first.base}; models that are served "
            "together are versions of one base"
        )
    return spec


def examine(reference: Reference) -> tuple[ModelSpec, list[Path]]:
    """What a reference stands for and its weight files, all checked; nothing is loaded."""
    spec = resolve(reference)
    if spec.family not in FAMILIES:
        raise CheckpointError(f"{spec.base} is of family {spec.family!r}; known families are {', '.join(FAMILIES)}")
    if (spec.base / INDEX).exists() and (found := detect(spec.base)) != spec.family:
        raise CheckpointError(f"{spec.base} is said to be of family {spec.family!r}, but its {INDEX} is of {found!r}")
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
