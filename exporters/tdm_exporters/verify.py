"""Whether an engine makes eager's pictures: errors graph by graph, whole pictures, a strict score, time a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from tdm_exporters.compare import Beside, Found, compare, requests, worst
from tdm_exporters.options import Score
from tdm_serve.artifact import Artifact
from tdm_serve.machine import stamp
from tdm_serve.pipeline import Pipeline

ROUNDS = 5  # pictures that are timed on each side, in turn


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a verified engine may be off by: relative errors of any graph's output, 8-bit values, and score."""

    largest: float
    mean: float
    picture_mean: float
    score: float


# Float types by their rounding; int8 by what its score allows.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-5, 0.05, 0.0),
    "fp16": Tolerance(2e-2, 1e-2, 1.0, 0.02),
    "bf16": Tolerance(1e-1, 5e-2, 4.0, 0.04),
    "int8": Tolerance(0.5, 0.2, 4.0, 0.03),
}


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and what of it is more than allowed."""

    tolerance: Tolerance
    parts: dict[str, dict[str, Any]]
    picture: dict[str, float]
    score: dict[str, float] | None
    latency_ms: dict[str, float]
    machine: dict[str, Any]
    failures: tuple[str, ...]

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def tolerance_of(artifact: Artifact) -> Tolerance:
    return TOLERANCES[artifact.dtype if artifact.quantise == "none" else artifact.quantise]


def verify(eager: Pipeline, exported: Pipeline, beside: Beside, artifact: Artifact, score: Score | None) -> Report:
    """Compares two pipelines over one checkpoint; the exported one runs on `beside`, which knows eager's functions."""
    allowed = tolerance_of(artifact)
    found = compare(exported.engine, beside, artifact.sizes, artifact.batch)
    picture = _pictures(eager, exported, artifact)
    scores = None if score is None else {"before": score(eager), "after": score(exported)}
    return Report(
        allowed,
        {name: _row(name, one, found) for name, one in worst(found).items()},
        picture,
        scores,
        _latency(eager, exported, artifact),
        stamp(),
        (*_part_failures(found, allowed), *_whole_failures(picture, scores, allowed)),
    )


def _row(part: str, one: Found, found: Sequence[Found]) -> dict[str, Any]:
    means = [other.error.mean for other in found if other.part == part]
    return {"largest_relative": one.error.largest, "mean_relative": max(means), "worst": one.where, "n": len(means)}


def _pictures(eager: Pipeline, exported: Pipeline, artifact: Artifact) -> dict[str, float]:
    """The difference of whole pictures, in 8-bit values."""
    wanted = requests(artifact.sizes)
    pairs = zip(eager.generate(wanted), exported.generate(wanted), strict=True)
    away = [np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int)) for a, b in pairs]
    return {"largest": float(max(one.max() for one in away)), "mean": float(max(one.mean() for one in away))}


def _latency(eager: Pipeline, exported: Pipeline, artifact: Artifact) -> dict[str, float]:
    """Median milliseconds of one picture, the two in turn; a look, not a benchmark."""
    request = requests(artifact.sizes[:1])[0]
    spent: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(ROUNDS):
        for name, pipeline in (("before", eager), ("after", exported)):
            started = time.perf_counter()
            pipeline.generate([request])
            spent[name].append((time.perf_counter() - started) * 1000)
    return {name: round(median(values), 2) for name, values in spent.items()}


def _part_failures(found: Sequence[Found], allowed: Tolerance) -> list[str]:
    """One sentence for the worst output of each graph that is off; the worst first."""
    off = [one for one in found if one.error.largest > allowed.largest or one.error.mean > allowed.mean]
    ranked = sorted(worst(off).values(), key=lambda one: one.error.largest, reverse=True)
    return [
        f"{one.part}: its output at {one.where} has a relative error of {one.error.largest:.2g}, {one.error.mean:.2g} "
        f"in the mean; allowed are {allowed.largest:g} and {allowed.mean:g}"
        for one in ranked
    ]


def _whole_failures(picture: dict[str, float], scores: dict[str, float] | None, allowed: Tolerance) -> list[str]:
    failures: list[str] = []
    if picture["mean"] > allowed.picture_mean:
        failures.append(
            f"pictures differ by {picture['mean']:.2f} of 255 in the mean; allowed is {allowed.picture_mean:g}"
        )
    if scores is not None and scores["after"] < scores["before"] - allowed.score - 1e-9:
        failures.append(
            f"the strict score fell from {scores['before']:.3f} to {scores['after']:.3f}; allowed is a loss of "
            f"{allowed.score:g}"
        )
    return failures
