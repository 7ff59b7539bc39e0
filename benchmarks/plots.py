"""Draws the plots of docs/training.md from the committed result files.

`docs/plots/ablations.png`: score and palette error of the micro world's methods against updates, the mean over seeds
in a band from the lowest to the highest. `docs/plots/nfe.png`: strict score of the embedded checkpoint's versions
against network evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import METRICS, RESULTS, rows

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"
PANELS = {"val_soft": "soft score (val)", "val_palette_error": "palette error"}
SIZE = (11.0, 4.2)  # inches
DPI = 110


def by_table(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows with curves, by their table's name."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        if row.get("curves", {}).get("val_soft"):
            tables.setdefault(row["table"], []).append(row)
    return tables


def band(axes: Axes, name: str, curves: Sequence[Sequence[Sequence[float]]]) -> None:
    """One line: the mean of several seeds' (update, value), and their range."""
    updates = [point[0] for point in curves[0]]
    values = np.array([[point[1] for point in curve] for curve in curves])  # (seeds, points)
    (line,) = axes.plot(updates, values.mean(0), label=name, marker=".")
    axes.fill_between(updates, values.min(0), values.max(0), alpha=0.15, color=line.get_color())


def ablations(found: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Two panels over updates: score and palette error, one line a table."""
    figure = Figure(SIZE, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(PANELS))
    for axes, (curve, label) in zip(panels, PANELS.items(), strict=True):
        for name, several in by_table(found).items():
            if several[0]["reward"] is not None and name != "surrogate-only":
                band(axes, name, [row["curves"][curve] for row in several])
        axes.set(xlabel="updates", ylabel=label)
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend(fontsize="small", ncols=2)
    figure.savefig(target, dpi=DPI)


def against_nfe(found: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Strict score over network evaluations, one line a method and split."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in found:
        guided = row["method"] != "teacher" or row["guidance"] != 1.0
        if guided:
            lines.setdefault((row["method"], row["split"]), {})[row["nfe"]] = row["strict"]
    figure = Figure((SIZE[0] / 2, SIZE[1]), layout="constrained")
    axes: Axes = figure.subplots()
    for (method, split), points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=f"{method}, {split}")
    axes.set(xscale="log", xlabel="network evaluations a picture (a guidance pair is two)", ylabel="strict score")
    axes.set_xticks(ticks := sorted({nfe for points in lines.values() for nfe in points}), map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=DPI)


def main() -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    ablations([row for row in rows(RESULTS / "experiments.jsonl") if row["world"] == "micro"], PLOTS / "ablations.png")
    against_nfe([row for row in rows(METRICS) if "method" in row], PLOTS / "nfe.png")
    print(PLOTS)


if __name__ == "__main__":
    main()
