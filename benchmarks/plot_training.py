"""The plots of quality: score against network evaluations, and the micro world's methods against updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import panels
from report_quality import METHODS
from report_quality import against_nfe as nfe_rows
from report_tables import Row, results
from report_training import HELPERS, LEVER

PANELS = {"reward": "reward of the rollouts", "val_soft": "soft score (val)", "val_palette_error": "palette error"}
OFF = 1.0  # guidance
TICKS = (1, 2, 4, 8, 16, 25, 50)
LOWEST_SOFT = 0.65  # what collapses leaves the panel


def scores() -> list[dict[str, Any]] | None:
    """Points of score against evaluations, a model's in order."""
    names = ("model", "nfe", "guidance", "strict", "strict_low", "strict_high", "untrained")
    return [{name: row[name] for name in names} for row in nfe_rows()] or None


def against_nfe(found: Sequence[Row]) -> Figure:
    """Strict score over network evaluations; hollow where a student was not trained for them.

    One line a model, and one more where it was also measured with guidance.
    """
    figure, [axes] = panels(6.6, 4.2)
    for model, guided in dict.fromkeys((row["model"], row["guidance"] != OFF) for row in found):
        points = [row for row in found if (row["model"], row["guidance"] != OFF) == (model, guided)]
        across, up, low, high = (
            [row[name] for row in points] for name in ("nfe", "strict", "strict_low", "strict_high")
        )
        (line,) = axes.plot(across, up, label=METHODS[model] + (", guided" if guided else ""))
        axes.fill_between(across, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        for row in points:
            face = "none" if row["untrained"] else line.get_color()
            axes.plot(row["nfe"], row["strict"], "o", color=line.get_color(), markerfacecolor=face)
    axes.set(xscale="log", xlabel="network evaluations a picture (a guidance pair is two)", ylabel="strict score")
    axes.set_xticks(TICKS, map(str, TICKS))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def experiments() -> list[dict[str, Any]] | None:
    """The micro world's rows, as far as they are drawn."""
    names = ("table", "seed", "reward", "curves")
    found = [
        {name: row[name] for name in names}
        for row in results("experiments")
        if row["world"] == "micro" and "curves" in row
    ]
    return found or None


def ablations(found: Sequence[Row]) -> Figure:
    """One panel a number over updates, one line a table: the mean over seeds in a band from lowest to highest."""
    figure, axes_of = panels(14.0, 4.6, len(PANELS))
    for axes, (curve, label) in zip(axes_of, PANELS.items(), strict=True):
        start = starts(found, curve)
        for name, several in by_table(found).items():
            band(axes, name, [[*start[row["seed"]], *row["curves"][curve]] for row in several])
        axes.set(xlabel="updates", ylabel=label)
    axes_of[1].set_ylim(bottom=LOWEST_SOFT)
    axes_of[-1].set_yscale("log")
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def by_table(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of reinforced students, by their table's name."""
    tables: dict[str, list[Row]] = {}
    for row in found:
        key = row["table"]
        if row["reward"] is not None and key not in HELPERS and not key.startswith(LEVER):
            tables.setdefault(key, []).append(row)
    return tables


def starts(found: Sequence[Row], curve: str) -> Mapping[int, list[tuple[int, float]]]:
    """By seed, update 0: the last value of the TDM run that the others go on from; empty if it has no such curve."""
    return {row["seed"]: [(0, y) for _, y in row["curves"][curve][-1:]] for row in found if row["table"] == "tdm"}


def band(axes: Axes, name: str, curves: Sequence[Sequence[Sequence[float]]]) -> None:
    """One line: the mean of several seeds' (update, value), and their range, as far as all of them went."""
    length = min(map(len, curves))
    updates = [point[0] for point in curves[0][:length]]
    values = np.array([[point[1] for point in curve[:length]] for curve in curves])  # (seeds, points)
    (line,) = axes.plot(updates, values.mean(0), label=name, marker=".")
    axes.fill_between(updates, values.min(0), values.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
