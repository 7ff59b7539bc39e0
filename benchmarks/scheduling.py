"""The scheduler on a virtual clock: promises, latency and goodput on two made-up devices, with noise in every run.

One device gains little by batches, as the default checkpoint does on two cores, and one gains much, as GPUs do; two
text lengths, so that not everything can share a batch. Nothing is measured here but decisions: a row says how exact
promises are where every run takes up to so much longer or shorter than predicted, and comes out the same anywhere.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import harness
import load
import numpy as np

from tdm_serve.core import Shape
from tdm_serve.profile import Device, Profile
from tdm_serve.scheduler import Policy, Stage, Work
from tdm_serve.scheduler.simulate import Arrival, capacity, simulate

SHORT, LONG = Shape(128, 128, 32), Shape(128, 128, 64)
LONGER = 1.12  # an evaluation of LONG over one of SHORT
SHARE = 0.7  # of SHORT among arrivals
DEVICES = {  # stage -> batch -> ms
    "little": {
        Stage.START: {1: 6.8, 2: 12.8, 4: 22.0},
        Stage.STEP: {1: 7.5, 2: 10.3, 4: 23.5},
        Stage.FINISH: {1: 15.9, 2: 30.3},
    },
    "much": {
        Stage.START: {1: 2.0, 2: 2.5, 4: 3.0, 8: 4.0},
        Stage.STEP: {1: 20.0, 2: 21.0, 4: 24.0, 8: 32.0, 16: 64.0},
        Stage.FINISH: {1: 5.0, 2: 7.0, 4: 12.0, 8: 22.0},
    },
}
PATIENT, BRIEF = Policy(), Policy(max_wait_ms=5000)


def profile(name: str) -> Profile:
    """One of DEVICES as if it had been measured."""
    found = Profile(Device(name, 2, "float32", "eager", "hash"))
    for shape, factor in ((SHORT, 1.0), (LONG, LONGER)):
        for stage, costs in DEVICES[name].items():
            for batch, ms in costs.items():
                found.observe(stage, shape, batch, ms * (factor if stage is Stage.STEP else 1.0))
    return found


def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Single pictures, as a Poisson process."""
    rng = random.Random(seed)
    shapes = (SHORT if rng.random() < SHARE else LONG for _ in iter(int, 1))
    return [
        Arrival(at, (Work(number, number, next(shapes), "model", 4, at),))
        for number, at in enumerate(load.poisson(rate, seconds, seed))
    ]


def measure(name: str, offered: float, noise: float, seconds: float, seeds: int) -> dict[str, Any]:
    """One row: `offered` is the rate of arrivals as a part of the capacity."""
    costs = profile(name)
    most = capacity(costs, SHORT, 4)
    errors, p95, goodput = list[float](), list[float](), list[float]()
    for seed in range(seeds):
        policy = BRIEF if offered > 1 else PATIENT
        trace = simulate(arrivals(offered * most, seconds, seed), costs, policy, noise=noise, seed=seed)
        errors += [result.error for result in trace.accepted]
        p95.append(float(np.percentile([result.took_ms for result in trace.accepted], 95)))
        goodput.append(trace.goodput(0, seconds * 1000) / most)
    return {
        "gains": name,
        "offered": offered,
        "noise": noise,
        "eta_error_p95": round(float(np.percentile(np.abs(errors), 95)), 3),
        "late": round(float(np.mean(np.array(errors) > 0.1)), 4),
        "p95_ms": round(float(np.median(p95)), 1),
        "goodput": round(float(np.mean(goodput)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="append the rows to the results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in DEVICES:
        for offered in (0.5, 0.8, 2.0):
            for noise in (0.0, 0.15):
                rows.append(measure(name, offered, noise, args.seconds, args.seeds))
                row = rows[-1]
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    harness.publish("scheduling", {"seconds": args.seconds, "seeds": args.seeds, "rows": rows}, keep=args.keep)


if __name__ == "__main__":
    main()
