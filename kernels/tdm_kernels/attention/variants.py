"""The shapes in which the attention kernels are built, by name, and the cards that each fits without spilling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

HEAD_DIMS = (64, 128)
CAPABILITIES = (80, 86, 89, 90, 100, 120)  # 90 is 9.0; a card between two of them counts as the older


@dataclass(frozen=True, slots=True)
class Variant:
    """A tile of `rows` queries against `keys` keys, by `warps` warps, with loads `stages` tiles ahead.

    `cards` are the capabilities that it fits, for each head dimension; the compile tests hold them to it.
    """

    loads: Literal["pointer", "tma"]
    rows: int
    keys: int
    warps: int
    stages: int
    cards: Mapping[int, tuple[int, ...]]


# In the order of preference where nothing was measured.
VARIANTS: dict[str, Variant] = {
    "pointer-128x64-w4-s3": Variant("pointer", 128, 64, 4, 3, {64: CAPABILITIES[:-1]}),
    "pointer-128x64-w8-s3": Variant("pointer", 128, 64, 8, 3, {64: CAPABILITIES, 128: CAPABILITIES}),
    "pointer-128x128-w8-s2": Variant("pointer", 128, 128, 8, 2, {64: CAPABILITIES, 128: (90, 100)}),
    # Four warps compute, eight more come from the compiler's specialisation.
    "tma-128x64-s3": Variant("tma", 128, 64, 4, 3, {64: (90,), 128: (90,)}),
    "tma-128x128-s2": Variant("tma", 128, 128, 4, 2, {64: (90,), 128: (90,)}),
    "tma-128x128-s3": Variant("tma", 128, 128, 4, 3, {64: (90,)}),
}


def fitting(head_dim: int, capability: tuple[int, int]) -> list[str]:
    """The variants that a card can run, best guess first. `capability` is at least (8, 0)."""
    number = capability[0] * 10 + capability[1]
    card = max(known for known in CAPABILITIES if known <= number)
    return [name for name, variant in VARIANTS.items() if card in variant.cards.get(head_dim, ())]


def default(head_dim: int, capability: tuple[int, int]) -> str:
    """The variant for a card where nothing was measured."""
    return fitting(head_dim, capability)[0]
