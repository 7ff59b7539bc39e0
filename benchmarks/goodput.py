"""Goodput against load: what is answered in time, ours beside the plain server's, from half the capacity to thrice.

Poisson arrivals at shares of our capacity, which a closed loop of eight clients measures first; both servers see the
same arrivals, in turn, load by load. In time is an answer within `--limit` seconds. That is also the longest wait that
our server accepts: it refuses at once what it could not do by then, and the baseline knows no refusal. A row is one
run: `capacity`, `clients`, `limit_ms`, `sides`, and `points` with `offered` (the share) and for each side `requests`,
`refused`, `goodput` (in time, as a share of the capacity over the time of the arrivals) and `latency_ms`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import load
import virtual
from load import REFUSED, Outcome
from serving import CLIENTS, Server, answered, baseline, check_same, fresh_prompts, must_be_answered, ours, throughput

from tdm_serve.convert import convert

LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)


def in_time(outcomes: Sequence[Outcome], limit_ms: float) -> int:
    return sum(latency <= limit_ms for latency in answered(outcomes))


def point(
    server: Server, arrivals_ms: Sequence[float], seconds: float, capacity: float, limit_ms: float
) -> dict[str, Any]:
    """One side at one load."""
    outcomes = load.opened(server.url, fresh_prompts(4), arrivals_ms)
    must_be_answered(outcomes, REFUSED)
    return {
        "requests": len(outcomes),
        "refused": sum(outcome.status == REFUSED for outcome in outcomes),
        "goodput": round(in_time(outcomes, limit_ms) / seconds / capacity, 3),
        "latency_ms": virtual.tail(answered(outcomes)),
    }


def measure(loads: Sequence[float], seconds: float, limit_s: float, scratch: Path) -> dict[str, Any]:
    """The row."""
    plain = convert("default", scratch / "plain")
    limited = ours(scratch / "ours", "--max-wait-s", f"{limit_s:g}")
    with limited as mine, baseline(plain, scratch / "baseline") as theirs:
        check_same(mine, theirs)
        capacity = throughput(mine, fresh_prompts(3), seconds)
        points: list[dict[str, Any]] = []
        for index, share in enumerate(loads):
            arrivals = load.poisson(share * capacity, seconds, seed=20 + index)
            found = {side.name: point(side, arrivals, seconds, capacity, limit_s * 1000) for side in (mine, theirs)}
            points.append({"offered": share, **found})
            print(line(points[-1], found), flush=True)
    return {
        "clients": CLIENTS,
        "seconds": seconds,
        "capacity": capacity,
        "limit_ms": limit_s * 1000,
        "sides": [mine.name, theirs.name],
        "points": points,
    }


def line(found: Mapping[str, Any], sides: Mapping[str, Mapping[str, Any]]) -> str:
    """One line of the table: goodput and refusals of each side."""
    parts = (f"{name} {side['goodput']:.2f} in time, {side['refused']} refused" for name, side in sides.items())
    return f"load {found['offered']:>4g}: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="arrivals as shares of our capacity")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals at each load (default: 8)")
    parser.add_argument(
        "--limit", type=float, default=2.0, help="seconds within which an answer is in time (default: 2)"
    )
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/goodput.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(arguments.loads, arguments.seconds, arguments.limit, Path(scratch))
    harness.publish("goodput", row, keep=arguments.keep)


if __name__ == "__main__":
    main()
