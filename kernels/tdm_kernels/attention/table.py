"""Which way to run attention was fastest where it was measured: rows of `table.json`.

`benchmarks/kernel_speed.py --tune` writes the rows of its device. A row holds device, head_dim, keys, streams (batch *
heads), ragged, backend and, for Triton, the variant. A shape takes the nearest row of its device; where the nearest is
more than a factor of two away in keys or streams, it counts as not measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tdm_kernels.attention.variants import VARIANTS

PATH = Path(__file__).with_name("table.json")
REACH = math.log2(2.0)


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how fast attention runs: one device, and sizes."""

    device: str
    head_dim: int
    keys: int
    streams: int
    ragged: bool

    def distance(self, other: Shape) -> float:
        """How many doublings of a size lie between them; infinite where they cannot be compared."""
        if (self.device, self.head_dim, self.ragged) != (other.device, other.head_dim, other.ragged):
            return math.inf
        return max(abs(math.log2(self.keys / other.keys)), abs(math.log2(self.streams / other.streams)))


@dataclass(frozen=True, slots=True)
class Row:
    """The fastest `backend` for a shape, and the Triton `variant` if that is "triton"."""

    shape: Shape
    backend: str
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.backend == "triton" and self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} in {PATH.name}; known: {', '.join(VARIANTS)}")


def parse(text: str) -> list[Row]:
    """Rows of a table file."""
    names = ("device", "head_dim", "keys", "streams", "ragged")
    return [
        Row(Shape(**{name: row[name] for name in names}), row["backend"], row.get("variant"))
        for row in json.loads(text)["rows"]
    ]


def nearest(rows: list[Row], shape: Shape) -> Row | None:
    """The row that was measured closest to `shape`, if any is close enough."""
    row = min(rows, key=lambda row: row.shape.distance(shape), default=None)
    return row if row is not None and row.shape.distance(shape) <= REACH else None


@cache
def lookup(shape: Shape) -> Row | None:
    """The committed table's answer for `shape`."""
    return nearest(_rows(), shape)


@cache
def _rows() -> list[Row]:
    return parse(PATH.read_text())
