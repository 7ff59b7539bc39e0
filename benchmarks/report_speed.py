"""Throughput by backend, size and batch, and the time from a cold start to the first picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report_tables import Row, machine, plain, results, section, table


def throughput() -> list[str]:
    """Pictures a second of the newest run, one table a size."""
    found = results("throughput")
    if not found:
        return []
    row = found[-1]
    sizes = dict.fromkeys(cell["size"] for cell in row["cells"])
    blocks = [
        block
        for size in sizes
        for block in ([f"{size}:"], by_batch([cell for cell in row["cells"] if cell["size"] == size]))
    ]
    counts = ", ".join(map(str, sorted({cell["nfe"] for cell in row["cells"] if "nfe" in cell})))
    intro = (
        f"Pictures a second by backend and batch, {counts} evaluations a picture; in brackets without text and decoder."
    )
    command = f"`python benchmarks/throughput.py --keep`; {machine(row)}."
    return section("## Throughput", intro, *blocks, source=command)


def by_batch(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    batches = sorted({cell["batch"] for cell in cells})
    backends = dict.fromkeys(cell["backend"] for cell in cells)
    values = {(cell["backend"], cell["batch"]): rate(cell) for cell in cells}
    body = [[f"`{backend}`", *(values.get((backend, batch), "") for batch in batches)] for backend in backends]
    return table(["backend", *(f"batch {batch}" for batch in batches)], body)


def rate(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return "not timed"
    whole = middle(cell["pictures_per_second"])
    denoise = cell.get("denoise_per_second")
    return plain(whole) + (f" ({plain(middle(denoise))})" if denoise is not None else "")


def middle(value: float | Mapping[str, float]) -> float:
    """A number, or the median of percentiles."""
    return value["p50"] if isinstance(value, Mapping) else value


def cold_start() -> list[str]:
    """Milliseconds from a new process to its first picture, by what happens meanwhile."""
    found = results("coldstart")
    if not found:
        return []
    row: Row = found[-1]
    stages = list(dict.fromkeys(stage for cell in row["cells"] for stage in cell["milliseconds"]))
    body = [
        [f"`{cell['command']}`", f"`{cell['backend']}`"]
        + [f"{cell['milliseconds'][stage]['p50']:.0f}" if stage in cell["milliseconds"] else "" for stage in stages]
        for cell in row["cells"]
    ]
    intro = "From a new process to its first picture; median milliseconds of each part."
    header = ["command", "backend", *(stage.replace("_", " ") for stage in stages)]
    source = f"`python benchmarks/coldstart.py --keep`; {machine(row)}."
    return section("## Cold start", intro, table(header, body), source=source)
