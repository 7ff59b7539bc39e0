"""Draws the plots of docs/training.md from the committed result files.

`docs/plots/ablations.png`: reward, score and palette error of the micro world's methods against updates, from the TDM
model that all start from; the mean over seeds in a band from the lowest to the highest. `docs/plots/nfe.png`: strict
score of the embedded checkpoint's versions against network evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import EXPERIMENTS, HELPERS, LEVER, RESULTS, rows

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"
PANELS = {"reward": "reward of the rollouts", "val_soft": "soft score (val)", "val_palette_error": "palette error"}
SIZE = (14.0, 4.6)  # inches
NFE_SIZE = (6.0, 4.2)
DPI = 110
TRAINED_NFE = 4
LOWEST_SOFT = 0.65  # what collapses leaves the panel


def by_table(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of reinforced students, by their table's name."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        key = row["table"]
        if row["reward"] is not None and key not in HELPERS and not key.startswith(LEVER):
            tables.setdefault(key, []).append(row)
    return tables


def starts(found: Sequence[Mapping[str, Any]], curve: str) -> dict[int, list[tuple[int, float]]]:
    """By seed, update 0: the last value of the TDM run that the others go on from; empty if it has no such curve."""
    return {row["seed"]: [(0, y) for _, y in row["curves"][curve][-1:]] for row in found if row["table"] == "tdm"}


def band(axes: Axes, name: str, curves: Sequence[Sequence[Sequence[float]]]) -> None:
    """One line: the mean of several seeds' (update, value), and their range, as far as all of them went."""
    length = min(map(len, curves))
    updates = [point[0] for point in curves[0][:length]]
    values = np.array([[point[1] for point in curve[:length]] for curve in curves])  # (seeds, points)
    (line,) = axes.plot(updates, values.mean(0), label=name, marker=".")
    axes.fill_between(updates, values.min(0), values.max(0), alpha=0.15, color=line.get_color())


def ablations(found: Sequence[Mapping[str, Any]], target: Path) -> None:
    """One panel a number over updates, one line a table."""
    figure = Figure(SIZE, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(PANELS))
    for axes, (curve, label) in zip(panels, PANELS.items(), strict=True):
        start = starts(found, curve)
        for name, several in by_table(found).items():
            band(axes, name, [[*start[row["seed"]], *row["curves"][curve]] for row in several])
        axes.set(xlabel="updates", ylabel=label)
        axes.grid(alpha=0.3)
    panels[1].set_ylim(bottom=LOWEST_SOFT)
    panels[-1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(target, dpi=DPI)


def against_nfe(found: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Strict score over network evaluations, one line a method; hollow where a student was not trained for them."""
    lines: dict[str, dict[int, float]] = {}
    for row in found:
        lines.setdefault(row["method"], {})[row["nfe"]] = row["strict"]
    figure = Figure(NFE_SIZE, layout="constrained")
    axes: Axes = figure.subplots()
    for method, points in sorted(lines.items()):
        across = sorted(points)
        (line,) = axes.plot(across, [points[nfe] for nfe in across], marker="o", markerfacecolor="white", label=method)
        trained = across if method == "teacher" else [TRAINED_NFE]
        axes.plot(trained, [points[nfe] for nfe in trained], "o", color=line.get_color())
    axes.set(xscale="log", xlabel="network evaluations a picture (a guidance pair is two)", ylabel="strict score (val)")
    axes.set_xticks(ticks := sorted({nfe for points in lines.values() for nfe in points}), map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=DPI)


def main() -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    ablations([row for row in rows(EXPERIMENTS) if row["world"] == "micro"], PLOTS / "ablations.png")
    against_nfe(rows(RESULTS / "nfe.jsonl"), PLOTS / "nfe.png")
    print(PLOTS)


if __name__ == "__main__":
    main()
