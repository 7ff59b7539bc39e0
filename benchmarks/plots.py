"""Every plot of the documents, drawn from the committed result files into docs/plots.

A plot is a pair of functions: what it shows, as plain data (None where nothing was measured), and how that is drawn.
The data's digest lies in the file, so `outdated` knows without drawing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import plot_speed
import plot_training
import serving_plot
from plot_style import STYLE, digest, drawn_digest, mpl, save
from report_tables import ROOT

PLOTS = ROOT / "docs" / "plots"


class Plot(NamedTuple):
    """`data` is JSON; `draw` makes the figure of it."""

    data: Callable[[], Any]
    draw: Callable[[Any], Any]


ALL: dict[str, Plot] = {
    "nfe": Plot(plot_training.scores, plot_training.against_nfe),
    "ablations": Plot(plot_training.experiments, plot_training.ablations),
    "latency": Plot(plot_speed.latencies, plot_speed.against_batch),
    "roofline": Plot(plot_speed.shares, plot_speed.roofline),
    "serving": Plot(serving_plot.newest, serving_plot.draw),
    "goodput": Plot(serving_plot.loads, serving_plot.against_load),
}


def outdated() -> list[Path]:
    """Files that do not show the committed rows: old, missing, or of a plot that has no data any more."""
    found: list[Path] = []
    for name, plot in ALL.items():
        path, data = PLOTS / f"{name}.svg", plot.data()
        wanted = None if data is None else digest(data)
        if drawn_digest(path) != wanted:
            found.append(path)
    return found


def draw_all() -> list[Path]:
    """Draws what is out of date, and says what that was."""
    old = outdated()
    for path in old:
        plot = ALL[path.stem]
        if (data := plot.data()) is None:
            path.unlink()
            continue
        with mpl.rc_context(STYLE):
            save(plot.draw(data), data, path)
    return old


if __name__ == "__main__":
    for drawn in draw_all():
        print(drawn)
