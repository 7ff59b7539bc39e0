"""The kernels in the forms that are released: types of arguments, compile-time values, warps and stages, by name.

An argument is spelled as Triton's signatures spell it, with `:16` behind it where it is always a multiple of 16 (bytes
for pointers, elements for strides). Without that hint, loads become scalar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from tdm_kernels.attention.variants import VARIANTS

HALF = ("bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Release:
    """`arguments` in the kernel's order, without those that `constants` fix (None is an argument left out).

    `capabilities` are those that it compiles for without spilling, which the compile tests check one by one.
    """

    name: str
    module: str
    function: str
    arguments: Mapping[str, str]
    constants: Mapping[str, int | float | bool | None]
    warps: int
    stages: int
    capabilities: tuple[int, ...]


def attention_name(dtype: str, head_dim: int, variant: str, *, ragged: bool = True, lse: bool = False) -> str:
    """The name of a release of joint attention."""
    parts = ["joint_attention", dtype, f"d{head_dim}", variant]
    return "-".join(parts + ["ragged"] * ragged + ["lse"] * lse)


def _attention() -> Iterator[Release]:
    for dtype, (variant, shape) in product(HALF, VARIANTS.items()):
        for head_dim, ragged_lse in product(shape.cards, ((False, False), (True, False), (True, True))):
            yield _attention_release(dtype, head_dim, variant, *ragged_lse)


def _attention_release(dtype: str, head_dim: int, variant: str, ragged: bool, lse: bool) -> Release:
    shape = VARIANTS[variant]
    strides = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "out") for axis in ("batch", "head", "line")]
    inputs = dict.fromkeys("qkv", f"*{dtype}:16") | {"kv_len": "*i32:16"}
    scalars = dict.fromkeys(strides, "i32:16") | dict.fromkeys(("q_lines", "k_lines", "heads"), "i32")
    everything = inputs | scalars | {"out": f"*{dtype}:16", "lse": "*fp32:16"}
    left_out = ["kv_len"] * (not ragged) + ["lse"] * (not lse)
    return Release(
        name=attention_name(dtype, head_dim, variant, ragged=ragged, lse=lse),
        module=f"tdm_kernels.attention.triton_{shape.loads}",
        function="attention",
        arguments={name: kind for name, kind in everything.items() if name not in left_out},
        constants={"HEAD": head_dim, "ROWS": shape.rows, "KEYS": shape.keys} | dict.fromkeys(left_out),
        warps=shape.warps,
        stages=shape.stages,
        capabilities=shape.cards[head_dim],
    )


RELEASES: dict[str, Release] = {release.name: release for release in _attention()}
