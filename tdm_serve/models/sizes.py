"""How large the parts of a model are, from the headers of its files or its configurations: nothing is loaded."""

from __future__ import annotations

import importlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tdm_serve.models.families.table import FAMILIES, read_index
from tdm_serve.models.folders import NETWORKS, component_files, network_of
from tdm_serve.models.outline import outline
from tdm_serve.models.quantise import is_quantised

SCALE_BYTES = 4  # of a row in fp8, a float32
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PartSize:
    """One part's numbers: all of them, those that fp8 would take (with their rows), and its largest tensor's."""

    name: str
    elements: int
    fp8_elements: int = 0
    fp8_rows: int = 0
    largest: int = 0
    stored: torch.dtype = torch.float32  # the widest type in its files

    def bytes(self, dtype: torch.dtype, *, fp8: bool = False) -> int:
        """What its weights take in a type."""
        if not fp8:
            return self.elements * dtype.itemsize
        rest = self.elements - self.fp8_elements
        return rest * dtype.itemsize + self.fp8_elements + self.fp8_rows * SCALE_BYTES

    @property
    def is_text(self) -> bool:
        return self.name not in NETWORKS


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's parts, the denoising network first, and what decoding a pixel takes beside them, in numbers."""

    parts: tuple[PartSize, ...]
    per_pixel: int

    @property
    def network(self) -> PartSize:
        return self.parts[0]


def sizes_of(base: Path, family: str, *, random: bool = False) -> Sizes:
    """Of a folder's files or, where its weights would be random, of its configurations."""
    entry, parts = FAMILIES[family], list[PartSize]()
    for name in entry.present(base, entry.components):
        stored = torch.float32
        if random:
            shapes = _built(base, name)
        else:
            shapes, stored = _held(component_files(base, name))
        parts.append(_size(name, shapes, stored, family if name == network_of(family) else ""))
    return Sizes(tuple(parts), _per_pixel(base / "vae"))


def _size(name: str, shapes: Shapes, stored: torch.dtype, family: str) -> PartSize:
    counts = {key: math.prod(shape) for key, shape in shapes.items()}
    taken = [key for key in shapes if family and is_quantised(family, key.removesuffix(".weight"), shapes[key])]
    return PartSize(
        name,
        sum(counts.values()),
        sum(counts[key] for key in taken),
        sum(shapes[key][0] for key in taken),
        max(counts.values(), default=0),
        stored,
    )


def _held(files: Iterable[Path]) -> tuple[Shapes, torch.dtype]:
    """Shapes of the floating tensors in safetensors files, and the widest of their types."""
    shapes: dict[str, tuple[int, ...]] = {}
    types: set[torch.dtype] = set()
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for key, one in header.items():
            if key != "__metadata__" and (one["dtype"] in DTYPES or str(one["dtype"]).startswith("F8")):
                shapes[key] = tuple(one["shape"])
                types.add(DTYPES.get(one["dtype"], torch.bfloat16))
    return shapes, max(types, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _built(base: Path, name: str) -> Shapes:
    """Shapes of what a part's class holds, built without memory; the pipeline's index names the class."""
    library, kind = read_index(base)[name]
    module = outline(getattr(importlib.import_module(library), kind), base / name)
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {key: tuple(tensor.shape) for key, tensor in tensors if tensor.is_floating_point()}


def _per_pixel(vae: Path) -> int:
    """Numbers that live at once for each pixel while an autoencoder decodes: three tensors of the widest channels at
    full size (input, output and an addend of a layer), and one more for what convolutions need to work.
    """
    channels = json.loads((vae / "config.json").read_text())["block_out_channels"]
    return 4 * int(channels[min(1, len(channels) - 1)])
