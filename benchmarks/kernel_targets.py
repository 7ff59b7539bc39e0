"""What the kernels are meant to reach, and whether rows of benchmarks/kernel_speed.py say that they do.

A speed target is the worst ratio over its shapes: cuDNN's (or torch.compile's) median over ours. Without a row that
measures it, a target is "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """`value` of a row is what has to reach `wanted`, or None where the row does not measure it."""

    name: str
    wanted: float
    value: Callable[[Row], float | None]


def best(row: Row, wanted: Callable[[str], bool]) -> float | None:
    """The smallest median among the contenders `wanted`."""
    return min((found["p50"] for name, found in row["contenders"].items() if wanted(name)), default=None)


def speedup(row: Row, over: str, ours: Callable[[str], bool]) -> float | None:
    """How many times faster the best of ours is than `over`."""
    mine, theirs = best(row, ours), best(row, lambda name: name == over)
    return None if mine is None or theirs is None else theirs / mine


def kernel(name: str) -> bool:
    return name.startswith(("pointer-", "tma-"))


def attention(head_dim: int, ragged: bool) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        wanted = (row["operation"], row["shape"].get("head_dim"), row["shape"].get("ragged"))
        return speedup(row, "cudnn", kernel) if wanted == ("joint_attention", head_dim, ragged) else None

    return value


def padded(row: Row) -> float | None:
    """Any head dimension that the kernels take."""
    values = (attention(head_dim, True)(row) for head_dim in (64, 128))
    return next((value for value in values if value is not None), None)


def quantised(whole: bool) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        if row["operation"] != "quantised_attention" or row["shape"]["tokens"] < 4096:
            return None
        return speedup(
            row, "cudnn", lambda name: name.startswith("int8+fp8") and name.endswith("quantisation") == whole
        )

    return value


def share_of_copy(operation: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found = row["contenders"].get("triton")
        return found["share_of_copy"] if row["operation"] == operation and found else None

    return value


def over_compile(row: Row) -> float | None:
    return speedup(row, "compile", lambda name: name == "triton") if row["operation"] == "qk_norm_rope" else None


TARGETS = (
    Target("attention, head dimension 128, over cuDNN", 0.95, attention(128, False)),
    Target("attention, head dimension 64, over cuDNN", 1.10, attention(64, False)),
    Target("attention with 20 to 50 % padding, over cuDNN with a mask", 1.3, padded),
    Target("int8 + fp8 attention from 4096 tokens, kernel alone, over cuDNN", 1.35, quantised(False)),
    Target("int8 + fp8 attention from 4096 tokens, with quantisation, over cuDNN", 1.15, quantised(True)),
    Target("GroupNorm with SiLU, share of copy bandwidth", 0.8, share_of_copy("group_norm_silu")),
    Target("QK-norm with RoPE, share of copy bandwidth", 0.8, share_of_copy("qk_norm_rope")),
    Target("QK-norm with RoPE, over torch.compile", 1.3, over_compile),
)


def verdicts(rows: Iterable[Row]) -> list[Row]:
    """Every target as measured: met, not met or not measured."""
    rows = list(rows)
    found: list[Row] = []
    for target in TARGETS:
        values = [value for row in rows if (value := target.value(row)) is not None]
        measured = round(min(values), 3) if values else None
        verdict = "not measured" if measured is None else "met" if measured >= target.wanted else "not met"
        found.append({"target": target.name, "wanted": target.wanted, "measured": measured, "verdict": verdict})
    return found
