"""What is wanted of Z-Image at full size on one GPU, and whether the rows of fullsize.py meet it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
OURS = ("tdm-serve", "tdm-serve compiled")
MODEL = "zimage-tdm-r1"


def best(row: Row) -> str:
    """Our faster engine."""
    present = [name for name in OURS if name in row["milliseconds"]]
    return min(present, key=lambda name: row["milliseconds"][name]["total"]["p50"])


def seconds(row: Row) -> float:
    return row["milliseconds"][best(row)]["total"]["p50"] / 1000


def outside(row: Row) -> float:
    """Milliseconds of all but the denoiser."""
    stages = row["milliseconds"][best(row)]
    return stages["total"]["p50"] - stages["denoise"]["p50"]


def over(peer: str) -> Callable[[Row], float | None]:
    """The peer's time over our best, both as median ratios to our eager engine."""

    def found(row: Row) -> float | None:
        if peer not in row["ratios"]:
            return None
        return row["ratios"][peer]["p50"] / (row["ratios"][best(row)]["p50"] if best(row) != OURS[0] else 1.0)

    return found


def rate(row: Row) -> float:
    return row["batch"] / seconds(row)


Measure = Callable[[Row], float | None]
# at batch 1: name, type, what is measured, what is wanted, whether more is better
TARGETS: tuple[tuple[str, str, Measure, float, bool], ...] = (
    ("seconds from prompt to PNG, 1024, bf16", "none", seconds, 0.45, False),
    ("seconds from prompt to PNG, 1024, fp8", "fp8", seconds, 0.35, False),
    ("times stock eager diffusers, 1024", "none", over("diffusers"), 1.5, True),
    ("times diffusers + torch.compile, 1024", "none", over("diffusers + compile"), 1.15, True),
    ("milliseconds outside the denoiser, 1024", "none", outside, 60.0, False),
)
BATCHED = ("images/s with batching, 512", 9.0)


def stated(rows: Sequence[Row]) -> list[str]:
    """One line a target; what was not measured is said to be so."""
    z_image = [row for row in rows if row["model"] == MODEL]
    lines: list[str] = []
    for name, quantise, measure, wanted, more in TARGETS:
        found = [row for row in z_image if (row["size"], row["batch"], row["quantise"]) == ("1024x1024", 1, quantise)]
        lines.append(line(name, measure(found[-1]) if found else None, wanted, more, found[-1:]))
    small = [row for row in z_image if row["size"] == "512x512"]
    top = max(small, key=rate, default=None)
    lines.append(line(BATCHED[0], None if top is None else rate(top), BATCHED[1], True, [] if top is None else [top]))
    return lines


def line(name: str, value: float | None, wanted: float, more: bool, rows: Sequence[Row]) -> str:
    if value is None:
        return f"Z-Image, {name}: not measured"
    met = value >= wanted if more else value <= wanted
    asked = f"{'at least' if more else 'at most'} {wanted:g}"
    return f"Z-Image, {name}: {value:.3f}, {asked}: " + ("met" if met else f"not met; {limit(rows[0])}")


def limit(row: Row) -> str:
    """What limits it: the stage that takes most, and how near that is to the machine."""
    stages = {name: values["p50"] for name, values in row["milliseconds"][best(row)].items() if name != "total"}
    stage = max(stages, key=stages.__getitem__)
    near = row["roofline"].get(stage)
    reached = f", at {near['share']:.0%} of what the {near['bound']} ceiling allows eager" if near else ""
    return f"{stage} takes {stages[stage]:.1f} ms{reached}"
