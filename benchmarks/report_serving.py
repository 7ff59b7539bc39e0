"""The README's table of the serving benchmark: what was aimed at beside what was measured, met or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Goal(NamedTuple):
    """One line: how to read it from the row, how to show it, and what it must be."""

    name: str
    measured: Callable[[Row], float]
    shown: str
    aim: str
    met: Callable[[Row], bool]


def ours(row: Row, load: str) -> Mapping[str, Any]:
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
