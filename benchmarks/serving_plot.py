"""The plots of the service: latencies at 0.8 of capacity beside throughput, and goodput against load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import panels
from report_tables import Row, results


def newest() -> dict[str, Any] | None:
    """Curves and rates of the newest row."""
    if not (found := results("serving")):
        return None
    row = found[-1]
    curves = {name: one["curve_ms"] for name, one in row["steady"].items()}
    curves["tdm-serve, virtual clock"] = row["steady"]["tdm-serve"]["simulated"]["curve_ms"]
    rates = {name: sorted(values)[len(values) // 2] for name, values in row["closed"]["pictures_per_second"].items()}
    rates["tdm-serve, prompts seen"] = row["seen_prompts"]["pictures_per_second"]
    rates["tdm-serve, bfloat16"] = row["bfloat16"]["pictures_per_second"]
    order = sorted(curves, reverse=True)  # ours first, in every plot the first colour
    return {"clients": row["clients"], "curves": {name: curves[name] for name in order}, "rates": rates}


def draw(found: Row) -> Figure:
    """Shares of requests that were answered within so many milliseconds, and pictures a second as bars."""
    figure, (left, right) = panels(11.0, 4.2, 2)
    for name, curve in found["curves"].items():
        distribution(left, name, curve)
    left.set(xscale="log", xlabel="milliseconds", ylabel="% of requests", title="Poisson arrivals at 0.8 of capacity")
    left.legend()
    bars = right.barh(list(found["rates"]), list(found["rates"].values()))
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    right.set(xlabel="pictures a second", title=f"{found['clients']} clients")
    right.margins(x=0.12)
    return figure


def distribution(axes: Axes, name: str, curve: Mapping[str, float]) -> None:
    """The virtual clock dashed, because it all but covers what was measured."""
    style = "--" if "virtual" in name else "-"
    axes.plot(list(curve.values()), [int(percentile) for percentile in curve], style, label=name)


def loads() -> dict[str, Any] | None:
    """Goodput by load and side of the newest sweep."""
    if not (found := results("goodput")):
        return None
    row = found[-1]
    lines = {side: [[point["offered"], point[side]["goodput"]] for point in row["points"]] for side in row["sides"]}
    return {"limit_ms": row["limit_ms"], "lines": lines}


def against_load(found: Row) -> Figure:
    """One line a side, beside what nobody can exceed."""
    figure, [axes] = panels(6.6, 4.2)
    for side, points in found["lines"].items():
        axes.plot([load for load, _ in points], [good for _, good in points], marker="o", label=side)
    most = max(load for points in found["lines"].values() for load, _ in points)
    axes.plot([0, 1, most], [0, 1, 1], ":", color="#8c8c8c", label="all that the capacity allows")
    axes.set(xlabel="arrivals, as a share of capacity", ylim=(0, 1.1), xlim=(0, most))
    axes.set_ylabel(f"answered within {found['limit_ms'] / 1000:g} s, share of capacity")
    axes.legend()
    return figure
