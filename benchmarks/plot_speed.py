"""The plots of speed: milliseconds a picture against batch, and the share of the roofline that each stage reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from plot_style import panels
from report_latency import newest
from report_tables import Row

P = ("p20", "p50", "p80")


def latencies() -> list[dict[str, Any]] | None:
    """Totals by contender of the newest rows of every batch; None for a single batch, which makes no line."""
    found = [
        {"size": row["size"], "dtype": row["dtype"], "batch": row["batch"], "total": totals(row)} for row in newest()
    ]
    return found if len({one["batch"] for one in found}) > 1 else None


def totals(row: Row) -> dict[str, dict[str, float]]:
    return {name: {p: stages["total"][p] for p in P} for name, stages in row["milliseconds"].items()}


def against_batch(found: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel a size and type, one line a contender, in a band from p20 to p80."""
    kinds = list(dict.fromkeys((row["size"], row["dtype"]) for row in found))
    figure, axes_of = panels(6.6 * len(kinds), 4.2, len(kinds))
    for axes, kind in zip(axes_of, kinds, strict=True):
        several = [row for row in found if (row["size"], row["dtype"]) == kind]
        for name in dict.fromkeys(name for row in several for name in row["total"]):
            points = [(row["batch"], row["total"][name]) for row in several if name in row["total"]]
            across = [batch for batch, _ in points]
            low, middle, high = ([total[p] / batch for batch, total in points] for p in P)
            (line,) = axes.plot(across, middle, label=name, marker="o")
            axes.fill_between(across, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set(xlabel="batch", ylabel="milliseconds a picture", title=", ".join(kind))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({row["batch"] for row in several}), map(str, ticks))
        axes.set_ylim(bottom=0)
    axes_of[0].legend()
    return figure


def shares() -> list[dict[str, Any]] | None:
    """Share by stage of every newest row with a roofline."""
    return [
        {
            "label": f"{row['size']}, batch {row['batch']}",
            "stages": {stage: [one["share"], one["bound"]] for stage, one in row["roofline"].items()},
        }
        for row in newest()
        if row.get("roofline")
    ] or None


def roofline(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars by stage, one colour a row; what binds stands behind the bar."""
    figure, [axes] = panels(7.6, 0.9 + 0.4 * sum(len(row["stages"]) for row in found))
    stages = list(dict.fromkeys(stage for row in found for stage in row["stages"]))
    height = 0.8 / len(found)
    for index, row in enumerate(found):
        at = [stages.index(stage) + (index + 0.5) * height - 0.4 for stage in row["stages"]]
        values = np.array([100 * share for share, _ in row["stages"].values()])
        bars = axes.barh(at, values, height, label=row["label"])
        words = [f"{100 * share:.0f} %, {bound}" for share, bound in row["stages"].values()]
        axes.bar_label(bars, words, padding=3)
    axes.set_yticks(range(len(stages)), stages)
    axes.invert_yaxis()
    axes.set(xlabel="% of the binding ceiling", xlim=(0, 125))
    axes.set_xticks(range(0, 101, 20))
    axes.legend(loc="lower right")
    return figure
