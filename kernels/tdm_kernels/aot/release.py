"""What a released kernel is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HALF = ("bf16", "fp16")
TYPES = {"bf16": "*bf16:16", "fp16": "*fp16:16", "fp8": "*fp8e4nv:16", "int8": "*i8:16", "fp32": "*fp32:16"}
INDICES = "*i32:16"
Constants = Mapping[str, int | float | bool | None]


@dataclass(frozen=True, slots=True)
class Release:
    """A kernel with its types and compile-time values.

    `arguments` are in the kernel's order, without those that `constants` fix (None is an argument left out). They are
    spelled as in Triton's signatures, with `:16` behind what is always a multiple of 16 (bytes for pointers, elements
    for strides): without that hint, loads become scalar. `capabilities` are those that it compiles for without
    spilling, which the compile tests check one by one.
    """

    name: str
    module: str
    function: str
    arguments: Mapping[str, str]
    constants: Constants
    warps: int
    stages: int
    capabilities: tuple[int, ...]
