"""One look for all plots: no background, and colours that stand out on GitHub's white and on its near-black alike.

A plot is an SVG whose description holds a digest of what was drawn, so that a check can tell an old one by its data,
whatever version of matplotlib drew it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

THEMES = ("#ffffff", "#0d1117")  # GitHub's pages
INK = "#768390"  # words, ticks and frames
COLOURS = ("#2f81d7", "#d9632b", "#2c974b", "#a475f9", "#c2567a", "#9a7b1f", "#1b95a0", "#8c8c8c", "#e5534b", "#5b7fa6")
VERSION = 1  # of the look: raise it, and every plot is out of date
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.linewidth": 1.8,
    "svg.hashsalt": "tdm-serve",  # the same file for the same data
}
MARK = re.compile(r"data ([0-9a-f]{64})")


def panels(width: float, height: float, count: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many inches with panels side by side."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def digest(data: Any) -> str:
    """Of what a plot shows."""
    return hashlib.sha256(json.dumps([VERSION, data], sort_keys=True).encode()).hexdigest()


def drawn_digest(path: Path) -> str | None:
    """What `save` wrote into a file; None where there is none."""
    found = MARK.search(path.read_text()) if path.exists() else None
    return found[1] if found else None


def save(figure: Figure, data: Any, target: Path) -> Path:
    """Writes the SVG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None, "Creator": None, "Description": f"data {digest(data)}"})
    return target
