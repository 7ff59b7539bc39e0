"""Releases of the memory-bound kernels: GroupNorm with SiLU, and norm, rotation and quantisation of q and k."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tdm_kernels.aot.release import HALF, INDICES, TYPES, Constants, Release
from tdm_kernels.attention.variants import CAPABILITIES
from tdm_kernels.group_norm.launch import MOST_CHANNELS, PIXELS, TILES, WARPS
from tdm_kernels.norm_rope import launch
from tdm_kernels.norm_rope.naive import KEY_BLOCK, QUERY_BLOCK

HEAD_DIMS = (64, 128)
GROUPS = (4, 8, 16)  # channels of a group in decoders of 128, 256 and 512 channels
EPS = 1e-6
STAGES = 3  # Triton's default, which launches do not change
STEP = "i32:16"
_MODULE = "tdm_kernels.norm_rope.triton_kernels"


def releases() -> Iterator[Release]:
    """All of them."""
    for dtype, group in product(HALF, GROUPS):
        yield from _group_norm(dtype, group)
    for dtype, head_dim, interleaved in product(HALF, HEAD_DIMS, (True, False)):
        pairs = "pairs" if interleaved else "halves"
        ending = f"{dtype}-d{head_dim}-{pairs}"
        constants = {"eps": EPS, "HEAD": head_dim, "INTERLEAVED": interleaved, "EACH": False}
        yield _norm_rope(f"qk_norm_rope-{ending}", TYPES[dtype], constants)
        yield _key_sums(f"quantise_qk-sums-{ending}", TYPES[dtype], constants)
        yield _to_int8(f"quantise_qk-keys-{ending}", TYPES[dtype], constants, KEY_BLOCK)
        yield _to_int8(f"quantise_qk-queries-{ending}", TYPES[dtype], constants, QUERY_BLOCK)


def _group_norm(dtype: str, group: int) -> Iterator[Release]:
    module, ending = "tdm_kernels.group_norm.triton_kernels", f"{dtype}-c{group}"
    picture, wide = TYPES[dtype], TYPES["fp32"]
    sizes = {"pixels": "i32", "channels": STEP}
    shape = {"PIXELS": PIXELS, "CHANNELS": MOST_CHANNELS, "GROUP": group, "LANES": group}
    moments = {"x": picture} | sizes | {"means": wide, "deviations": wide}
    yield _memory_bound(f"group_norm_silu-moments-{ending}", module, "moments", moments, shape, WARPS)
    join = {"means": wide, "deviations": wide, "pixels": "i32", "tiles": "i32", "mean": wide, "scale": wide}
    constants = {"eps": EPS, "PIXELS": PIXELS, "GROUP": group, "TILES": TILES}
    yield _memory_bound(f"group_norm_silu-join-{ending}", module, "join", join, constants, WARPS)
    apply = dict.fromkeys(("x", "weight", "bias"), picture) | {"mean": wide, "scale": wide} | sizes | {"out": picture}
    yield _memory_bound(f"group_norm_silu-apply-{ending}", module, "apply", apply, shape, WARPS)


def _norm_rope(name: str, kind: str, constants: Constants) -> Release:
    steps = [f"{tensor}_{axis}" for tensor in "qk" for axis in ("batch", "line", "head")]
    inputs = dict.fromkeys(("q", "k", "q_weight", "k_weight"), kind) | _turn()
    arguments = inputs | dict.fromkeys(steps, STEP) | _sizes() | {"q_out": kind, "k_out": kind}
    return _memory_bound(name, _MODULE, "norm_rope", arguments, {**constants, "ROWS": launch.ROWS}, launch.WARPS)


def _key_sums(name: str, kind: str, constants: Constants) -> Release:
    inputs = {"k": kind, "weight": kind} | _turn() | {"kv_len": INDICES}
    arguments = inputs | _steps("k") | _sizes() | {"sums": TYPES["fp32"]}
    constants = {**constants, "BLOCK": KEY_BLOCK}
    return _memory_bound(name, _MODULE, "key_sums", arguments, constants, launch.BLOCK_WARPS[KEY_BLOCK])


def _to_int8(name: str, kind: str, constants: Constants, block: int) -> Release:
    """Keys are smoothed and ragged; of queries there is neither."""
    inputs = {"x": kind, "weight": kind} | _turn()
    left_out: Constants = {"mean": None, "kv_len": None}
    if block == KEY_BLOCK:
        inputs, left_out = inputs | {"mean": TYPES["fp32"], "kv_len": INDICES}, {}
    arguments = inputs | _steps("x") | _sizes() | {"out": TYPES["int8"], "scales": TYPES["fp32"]}
    fixed = {**constants, "BLOCK": block, **left_out}
    return _memory_bound(name, _MODULE, "to_int8", arguments, fixed, launch.BLOCK_WARPS[block])


def _turn() -> dict[str, str]:
    return {"cos": TYPES["fp32"], "sin": TYPES["fp32"]}


def _steps(tensor: str) -> dict[str, str]:
    return dict.fromkeys((f"{tensor}_batch", f"{tensor}_line", f"{tensor}_head"), STEP)


def _sizes() -> dict[str, str]:
    return {"tokens": "i32", "heads": "i32"}


def _memory_bound(
    name: str,
    module: str,
    function: str,
    arguments: dict[str, str],
    constants: Constants,
    warps: int,
) -> Release:
    return Release(name, module, function, arguments, constants, warps, STAGES, CAPABILITIES)
