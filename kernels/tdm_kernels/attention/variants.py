"""The shapes in which the attention kernels are built, by name, and the one for a card that nobody measured yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HEAD_DIMS = (64, 128)


@dataclass(frozen=True, slots=True)
class Variant:
    """A tile of `rows` queries against `keys` keys, by `warps` warps, with loads `stages` tiles ahead."""

    loads: Literal["pointer", "tma"]
    rows: int
    keys: int
    warps: int
    stages: int


VARIANTS: dict[str, Variant] = {
    "pointer-128x64-w4-s3": Variant("pointer", 128, 64, 4, 3),
    "pointer-128x64-w8-s3": Variant("pointer", 128, 64, 8, 3),
    "pointer-128x128-w8-s2": Variant("pointer", 128, 128, 8, 2),
    # Four warps compute, eight more come from the compiler's specialisation.
    "tma-128x64-s3": Variant("tma", 128, 64, 4, 3),
    "tma-128x128-s2": Variant("tma", 128, 128, 4, 2),
    "tma-128x128-s3": Variant("tma", 128, 128, 4, 3),
}


def default(head_dim: int, capability: tuple[int, int]) -> str:
    """A variant that fits the registers and shared memory of every supported card, as the compile tests show."""
    if head_dim == 64 and capability < (12, 0):
        return "pointer-128x64-w4-s3"
    return "pointer-128x64-w8-s3"


def candidates(head_dim: int, capability: tuple[int, int]) -> list[str]:
    """What a benchmark may try on a card: only what compiles for it without spills (see the table of gates)."""
    names = [default(head_dim, capability)]
    if capability[0] == 9:
        names += ["pointer-128x128-w8-s2", "tma-128x64-s3", "tma-128x128-s2"]
        if head_dim == 64:
            names += ["pointer-128x64-w8-s3", "tma-128x128-s3"]
    if capability[0] == 10:
        names += ["pointer-128x128-w8-s2"] if head_dim == 128 else ["pointer-128x64-w8-s3"]
    return names
