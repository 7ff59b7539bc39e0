"""A model of full size without a download: the real classes with random weights. Its pictures are noise.

For how much memory and time a published model takes on a machine, weights do not matter, shapes do. A reference is a
catalogue id, perhaps with variants behind colons: `:tiny` for tests, `:no-t5` for SD3 without its third encoder.
"""

from __future__ import annotations

import logging
import math
import tempfile
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tdm_serve.errors import ConfigError, UnknownModel
from tdm_serve.models.architectures import architecture_of
from tdm_serve.models.catalog import resolve
from tdm_serve.models.entries import Entry, catalogue
from tdm_serve.models.outline import outline
from tdm_serve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

WARNING = "random weights: its pictures are noise"
VARIANTS = {"tiny": frozenset[str](), "no-t5": frozenset({"text_encoder_3", "tokenizer_3"})}
TINY_PX, LARGEST_PX = 64, 2048  # noise has no size that it was trained for


@contextmanager
def random_specs(references: Sequence[str]) -> Generator[list[ModelSpec]]:
    """What to load for catalogue ids, on a folder of configurations that lives as long as the block.

    Raises UnknownModel or ConfigError.
    """
    with tempfile.TemporaryDirectory(prefix="tdm-serve-random-") as scratch:
        yield [_spec(reference, Path(scratch)) for reference in references]


def _spec(reference: str, scratch: Path) -> ModelSpec:
    name, *variants = reference.split(":")
    entry = catalogue().get(name)
    if entry is None or entry.base is None:
        if entry is None and not Path(reference.rpartition("@")[0] or reference).exists():
            raise UnknownModel(
                f"model {reference!r} cannot have random weights: that is for folders and {', '.join(catalogue())}"
            )
        return _marked(resolve(reference))
    if odd := sorted(set(variants) - set(VARIANTS)):
        raise ConfigError(f"{reference!r} has the variant {odd[0]!r}; random weights come in {', '.join(VARIANTS)}")
    return _marked(_published_spec(entry, entry.base.repo, frozenset(variants), scratch))


def _published_spec(entry: Entry, base: str, variants: frozenset[str], scratch: Path) -> ModelSpec:
    architecture, tiny = architecture_of(base), "tiny" in variants
    folder = scratch / "-".join((architecture.name, *sorted(variants)))
    if not folder.exists():
        without = frozenset[str]().union(*(VARIANTS[one] for one in variants))
        if odd := without - {*architecture.parts, *architecture.tokenizers}:
            raise ConfigError(f"{entry.id} has no {min(odd)}, so nothing of it can be left out")
        architecture.write(folder, tiny=tiny, without=without)
    spec = entry.spec(folder)
    if tiny:
        return replace(spec, width=TINY_PX, height=TINY_PX, min_side=TINY_PX // 2, max_side=2 * TINY_PX)
    return replace(spec, max_side=LARGEST_PX)


def _marked(spec: ModelSpec) -> ModelSpec:
    """Adapters have the shapes of what they are added to, so a model is as large and as fast without them."""
    logger.warning("%s has %s", spec.id, WARNING)
    return replace(spec, adapters=(), preview=None, description=f"{spec.description} ({WARNING})".strip())


def build(kind: type[M], folder: Path, device: torch.device, dtype: torch.dtype) -> M:
    """A module from its configuration alone, drawn on its device in its type: never twice in memory.

    Equal configurations give equal weights on devices of one kind.
    """
    module = outline(kind, folder)
    fill(module, device, dtype)
    return module.to(device).eval().requires_grad_(False)


@torch.no_grad()
def fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter memory and values; parameters that are one stay one."""
    made: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in made:
                drawn = _drawn(f"{path}.{name}", parameter.shape, device, dtype)
                made[id(parameter)] = nn.Parameter(drawn, requires_grad=False)
            setattr(owner, name, made[id(parameter)])


def _drawn(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values that keep activations of the order of one: 1 for scales, 0 for biases, else +-sqrt(3 / inputs)."""
    values = torch.empty(shape, device=device, dtype=dtype)
    if name.endswith("bias"):
        return values.zero_()
    if len(shape) < 2 and name.endswith("weight"):
        return values.fill_(1.0)
    bound = math.sqrt(3 / max(1, math.prod(shape[1:])))
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return values.uniform_(-bound, bound, generator=generator)
