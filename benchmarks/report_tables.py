"""What every section of a report uses: where rows lie, the newest of a kind, Markdown tables, a machine in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METRICS = ROOT / "tdm_serve" / "checkpoints" / "scenes" / "training" / "metrics.jsonl"  # beside the weights

Row = Mapping[str, Any]


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a result file; none where it was never run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(name: str) -> list[dict[str, Any]]:
    """All rows of benchmarks/results/NAME.jsonl."""
    return rows(RESULTS / f"{name}.jsonl")


def latest(found: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], Row]:
    """The newest row for every combination of keys; None stands for a key that a row lacks."""
    return {tuple(row.get(key) for key in keys): row for row in found}


def machine(row: Row, *more: Row) -> str:
    """What a row was measured on; the commits of `more` rows from the same machine, too."""
    found = row["machine"]
    commits = dict.fromkeys(each["machine"]["commit"] for each in (row, *more))
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return (
        f"{found['device']}, {found['cores']} cores, {threads}, OpenMP "
        f"policy {found['omp_wait_policy']}, torch {found['versions']['torch']}, commit {', '.join(commits)}"
    )


def table(header: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    rule = "|---" * len(header) + "|"
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    return [head, rule, *lines]


def section(title: str, intro: str, *blocks: Sequence[str], source: str = "") -> list[str]:
    """A heading, what it shows, tables or plots with a blank line around each, and where the numbers are from."""
    lines = [title, "", intro, ""]
    for block in blocks:
        lines += [*block, ""] if block else []
    return lines + ([source, ""] if source else [])


def plot(name: str, alternative: str, folder: str = "plots") -> list[str]:
    """A picture of docs/plots, as a document that lies in docs/ refers to it."""
    return [f"![{alternative}]({folder}/{name}.svg)"]


def spread(found: Mapping[str, float], digits: int = 2) -> str:
    """A median with p20 and p80 in brackets."""
    return f"{found['p50']:.{digits}f} ({found['p20']:.{digits}f} to {found['p80']:.{digits}f})"


def plain(value: float) -> str:
    """Three digits that count, without an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"
