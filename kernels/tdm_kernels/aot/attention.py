"""Releases of joint attention, plain and quantised."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tdm_kernels.aot.release import HALF, INDICES, TYPES, Release
from tdm_kernels.attention.variants import CAPABILITIES, VARIANTS
from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK
from tdm_kernels.quantised.launch import HEAD_DIMS, Loads, plan

STRIDE = "i32:16"
SIZES = dict.fromkeys(("q_lines", "k_lines", "heads"), "i32")


def strides(*tensors: str) -> dict[str, str]:
    """Three for each tensor."""
    return {f"{tensor}_{axis}": STRIDE for tensor in tensors for axis in ("batch", "head", "line")}


def attention_name(dtype: str, head_dim: int, variant: str, *, ragged: bool = True, lse: bool = False) -> str:
    """The name of a release of joint attention."""
    parts = ["joint_attention", dtype, f"d{head_dim}", variant]
    return "-".join(parts + ["ragged"] * ragged + ["lse"] * lse)


def quantised_name(values: str, head_dim: int, loads: Loads) -> str:
    """The name of a release of quantised attention; `values` is fp8 or bf16, and so is the result with 16 bits."""
    return f"quantised_attention-{values}-d{head_dim}-{loads}"


def releases() -> Iterator[Release]:
    """All of them."""
    for dtype, (variant, shape) in product(HALF, VARIANTS.items()):
        for head_dim, ragged_lse in product(shape.cards, ((False, False), (True, False), (True, True))):
            yield _plain(dtype, head_dim, variant, *ragged_lse)
    for values, head_dim in product(("bf16", "fp8"), HEAD_DIMS):
        yield _quantised(values, head_dim, "pointer")
        yield _quantised(values, head_dim, "tma")


def _plain(dtype: str, head_dim: int, variant: str, ragged: bool, lse: bool) -> Release:
    shape = VARIANTS[variant]
    inputs = dict.fromkeys("qkv", TYPES[dtype]) | {"kv_len": INDICES}
    outputs = {"out": TYPES[dtype], "lse": TYPES["fp32"]}
    everything = inputs | strides("q", "k", "v", "out") | SIZES | outputs
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


def _quantised(values: str, head_dim: int, loads: Loads) -> Release:
    """Ragged, with a bfloat16 result."""
    fp8 = values == "fp8"
    whole = {"q": TYPES["int8"], "q_scale": TYPES["fp32"], "k": TYPES["int8"], "k_scale": TYPES["fp32"]}
    inputs = whole | {"v": TYPES[values]} | ({"v_scale": TYPES["fp32"]} if fp8 else {}) | {"kv_len": INDICES}
    steps = dict.fromkeys(("v_batch", "v_head", "v_step"), STRIDE) | strides("out")
    options = plan(loads, fp8)
    return Release(
        name=quantised_name(values, head_dim, loads),
        module=f"tdm_kernels.quantised.triton_{loads}",
        function="attention",
        arguments=inputs | steps | SIZES | {"out": TYPES["bf16"]},
        constants={"HEAD": head_dim, "ROWS": QUERY_BLOCK, "KEYS": KEY_BLOCK} | ({} if fp8 else {"v_scale": None}),
        warps=options["num_warps"],
        stages=options["num_stages"],
        capabilities=(90,) if loads == "tma" else CAPABILITIES[2:] if fp8 else CAPABILITIES,
    )
