"""What a server's own scheduler makes of arrivals on a virtual clock, with the profile that the server measured.

The difference between this and what a client sees is everything that the profile does not know: HTTP, PNG, the load
generator on the same cores, and a machine that is not always equally fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tdm_serve import Pipeline
from tdm_serve.core import Request
from tdm_serve.profile import Device, Profile
from tdm_serve.scheduler import Work
from tdm_serve.scheduler.simulate import Arrival, simulate


@cache
def model() -> Pipeline:
    """Only for the shapes of prompts: nothing is run."""
    return Pipeline.from_pretrained("default", device="cpu", dtype="float32")


def profile_in(state: Path) -> Profile:
    """The profile that a server left in its state folder."""
    [path] = state.glob("profile-*.json")
    return Profile.load(path, Device(**json.loads(path.read_text())["device"]), steps=len(model().info.sigmas))


def latencies(state: Path, prompts: Iterator[str], arrivals_ms: Sequence[float]) -> dict[str, Any]:
    """p50, p95 and p99 milliseconds, their whole curve, and the share that was refused."""
    info, check = model().info, model().engine.check
    arrivals: list[Arrival] = []
    for number, at in enumerate(arrivals_ms):
        shape = check(Request(next(prompts), 0, info.width, info.height))
        arrivals.append(Arrival(at, (Work(number, number, shape, info.id, len(info.sigmas), at),)))
    trace = simulate(arrivals, profile_in(state))
    took = [result.took_ms for result in trace.accepted]
    return {**tail(took), "refused": round(len(trace.refused) / len(trace.results), 4), "curve_ms": curve(took)}


def tail(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 95, 99)} if values else {}


def curve(values: Sequence[float]) -> dict[str, float]:
    """Percentiles from 1 to 99, for a plot."""
    return {str(p): round(float(np.percentile(values, p)), 1) for p in (1, *range(5, 100, 5), 99)} if values else {}
