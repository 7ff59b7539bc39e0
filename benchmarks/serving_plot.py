"""Draws a row of the serving benchmark: latencies at 0.8 of capacity as distributions, and throughput as bars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLOT = Path(__file__).resolve().parent.parent / "docs" / "plots" / "serving.png"
SIZE = (11.0, 4.2)  # inches
DPI = 110


def distribution(axes: Axes, name: str, curve: Mapping[str, float]) -> None:
    """Share of requests that were answered within so many milliseconds."""
    axes.plot(list(curve.values()), [int(percentile) for percentile in curve], label=name)


def draw(row: Mapping[str, Any], target: Path = PLOT) -> Path:
    """One picture with two panels."""
    figure = Figure(SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    steady = row["steady"]
    for name, found in steady.items():
        distribution(left, name, found["curve_ms"])
    distribution(left, "tdm-serve, virtual clock", steady["tdm-serve"]["simulated"]["curve_ms"])
    left.set(xscale="log", xlabel="milliseconds", ylabel="% of requests", title="Poisson arrivals at 0.8 of capacity")
    left.grid(alpha=0.3)
    left.legend()
    rates = {name: sorted(values)[len(values) // 2] for name, values in row["closed"]["pictures_per_second"].items()}
    rates["tdm-serve, prompts seen"] = row["seen_prompts"]["pictures_per_second"]
    rates["tdm-serve, bfloat16"] = row["bfloat16"]["pictures_per_second"]
    bars = right.barh(list(rates), list(rates.values()))
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    right.set(xlabel="pictures a second", title=f"{row['clients']} clients")
    right.margins(x=0.12)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    return target


if __name__ == "__main__":
    print(draw(json.loads((RESULTS / "serving.jsonl").read_text().splitlines()[-1])))
