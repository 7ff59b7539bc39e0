"""The service under load: what was aimed at beside what was measured, goodput against load, and the virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from report_tables import Row, machine, plot, results, section, table


class Goal(NamedTuple):
    """One line: how to read it from the row, how to show it, and what it must be."""

    name: str
    measured: Callable[[Row], float]
    shown: str
    aim: str
    met: Callable[[Row], bool]


def ours(row: Row, load: str) -> Row:
    return row[load]["tdm-serve"]


def steady_p95(row: Row) -> float:
    return ours(row, "steady")["latency_ms"]["p95"]


GOALS = (
    Goal(
        "throughput over the baseline's, eight clients",
        lambda row: row["closed"]["ratio"]["p50"],
        "{:.2f}x",
        "1.4x or more",
        lambda row: row["closed"]["ratio"]["p50"] >= 1.4,
    ),
    Goal(
        "HTTP, queue and PNG beside the model, one client, p50",
        lambda row: ours(row, "alone")["overhead_ms"]["p50"],
        "{:.1f} ms",
        "at most 5 ms",
        lambda row: ours(row, "alone")["overhead_ms"]["p50"] <= 5,
    ),
    Goal(
        "Poisson arrivals at 0.8 of capacity, p95",
        steady_p95,
        "{:.0f} ms",
        "below the baseline's",
        lambda row: steady_p95(row) < row["steady"]["baseline"]["latency_ms"]["p95"],
    ),
    Goal(
        "the same, over the virtual clock's p95",
        lambda row: ours(row, "steady")["p95_over_simulated"],
        "{:.2f}x",
        "at most 1.15x",
        lambda row: ours(row, "steady")["p95_over_simulated"] <= 1.15,
    ),
    Goal(
        "the same, error of the promised time, p95",
        lambda row: 100 * ours(row, "steady")["eta_error_p95"],
        "{:.0f} %",
        "at most 15 %",
        lambda row: ours(row, "steady")["eta_error_p95"] <= 0.15,
    ),
    Goal(
        "arrivals at twice the capacity, on time, of capacity",
        lambda row: 100 * row["overload"]["goodput"],
        "{:.0f} %",
        "at least 90 %",
        lambda row: row["overload"]["goodput"] >= 0.9,
    ),
    Goal(
        "the same, accepted and more than 10 % late",
        lambda row: 100 * row["overload"]["late"],
        "{:.0f} %",
        "at most 1 %",
        lambda row: row["overload"]["late"] <= 0.01,
    ),
)


def intro(row: Row) -> str:
    """What was compared, and the plain numbers."""
    own, other = (sorted(rates)[len(rates) // 2] for rates in row["closed"]["pictures_per_second"].values())
    alone, plain = (found["latency_ms"]["p50"] for found in row["alone"].values())
    seen, half = (row[name]["pictures_per_second"] for name in ("seen_prompts", "bfloat16"))
    return (
        "The service beside a plain FastAPI server around stock diffusers with one lock, on the same weights, both "
        f"under load from their own two cores. {row['clients']} clients: {own:.1f} pictures/s against {other:.1f} "
        f"({seen:.1f} with known prompts, {half:.1f} in bfloat16); one client: {alone:.0f} against {plain:.0f} ms."
    )


def lines(row: Row) -> list[list[str]]:
    """One line a goal."""
    return [
        [goal.name, goal.shown.format(goal.measured(row)), goal.aim, "yes" if goal.met(row) else "**no**"]
        for goal in GOALS
    ]


def newest() -> Row:
    return results("serving")[-1]


def goals(folder: str) -> list[str]:
    row = newest()
    command = (
        f"`python benchmarks/serving.py --rounds {row['rounds']} --seconds {row['seconds']:g} --keep`; {machine(row)}."
    )
    drawn = plot("serving", "Latencies at 0.8 of capacity, and pictures a second with eight clients", folder)
    body = table(["goal", "measured", "aim", "met"], lines(row))
    return section("## Serving", intro(row), body, drawn, source=command)


def short() -> list[str]:
    """As the README has it."""
    return goals("docs/plots")


def serving() -> list[str]:
    """As docs/benchmarks.md has it."""
    return goals("plots")


def goodput() -> list[str]:
    """What is answered on time against what is asked, ours beside the baseline."""
    found = results("goodput")
    if not found:
        return []
    row = found[-1]
    body = [
        [f"{point['offered']:g}", *(cell for side in row["sides"] for cell in cells(point[side]))]
        for point in row["points"]
    ]
    header = ["load"]
    for side in row["sides"]:
        header += [f"{side}: in time", "p95, ms", "refused"]
    text = (
        f"Poisson arrivals at a share of {row['capacity']:.1f} pictures a second, our capacity with {row['clients']} "
        f"clients. *In time*: answered within {row['limit_ms'] / 1000:g} s, as a share of that capacity; both servers "
        "see the same arrivals. Ours refuses at once what it could not do in time; the baseline knows no refusal."
    )
    source = f"`python benchmarks/goodput.py --keep`; {machine(row)}."
    return section(
        "## Goodput against load", text, plot("goodput", "Goodput against load"), table(header, body), source=source
    )


def cells(found: Row) -> list[str]:
    p95 = found["latency_ms"].get("p95")
    return [
        f"{found['goodput']:.2f}",
        "" if p95 is None else f"{p95:.0f}",
        f"{found['refused'] / found['requests']:.0%}",
    ]


def scheduling() -> list[str]:
    """The scheduler on a virtual clock."""
    found = results("scheduling")
    if not found:
        return []
    row = found[-1]
    body = [
        [
            one["gains"],
            f"{one['offered']:g}",
            f"{one['noise']:.0%}",
            f"{one['goodput']:.2f}",
            f"{one['p95_ms']:.0f}",
            f"{one['eta_error_p95']:.0%}",
            f"{one['late']:.1%}",
        ]
        for one in row["rows"]
    ]
    text = (
        "The scheduler alone, on a virtual clock with two made-up devices: one that gains little by batches, one that "
        f"gains much. Every run takes up to so much longer or shorter than predicted. {row['seconds']:g} s, "
        f"{row['seeds']} seeds."
    )
    header = ["gain by batches", "load", "noise", "goodput", "p95, ms", "promise error, p95", "late"]
    source = f"`python benchmarks/scheduling.py --keep`; {machine(row)}."
    return section("## Scheduling", text, table(header, body), source=source)
