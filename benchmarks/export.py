"""Exported engines of the default checkpoint beside eager torch, in one run: milliseconds by stage, megabytes, errors.

All sides: prompt to picture, the same prompts and seeds, threads and OpenMP policy, prompts not cached. Before anything
is timed each engine must make eager's pictures: float ones within 2 of 255, int8 ones as its own report says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import numpy as np
import torch

from tdm_serve.artifact import REPORT, read_artifact
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.pipeline import Pipeline

PROMPTS = ("two red circles", "a blue ring to the left of a yellow star", 'the word "CAT" in green', "a white cross")
STAGES = ("text", "denoise", "decode", "total")


def opened(engine: Path | None) -> Pipeline:
    """Without a prompt cache, so that every picture pays for its text."""
    return Pipeline(Engine.load("default", device="cpu", dtype="float32", engine=engine, cache_mb=0))


def batch_of(index: int, size: int) -> list[Request]:
    """Pictures of one batch, other ones in every round."""
    return [Request(PROMPTS[(index + i) % len(PROMPTS)], 100 + index * size + i, 128, 128) for i in range(size)]


def timed(pipeline: Pipeline, size: int, index: int) -> Mapping[str, float]:
    """Milliseconds by stage of one batch; every picture of it reports the batch's."""
    timings = pipeline.generate(batch_of(index, size))[0].timings_ms
    return {stage: timings[stage] for stage in STAGES}


def difference(eager: Pipeline, other: Pipeline) -> int:
    """Largest difference in 8-bit values."""
    pairs = zip(eager.generate(batch_of(0, 4)), other.generate(batch_of(0, 4)), strict=True)
    return max(int(np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int)).max()) for a, b in pairs)


def name_of(engine: Path) -> str:
    artifact = read_artifact(engine)
    return artifact.kind if artifact.quantise == "none" else f"{artifact.kind} {artifact.quantise}"


def facts(engine: Path) -> dict[str, Any]:
    """Megabytes by part, and what the export's own verification found."""
    artifact, report = read_artifact(engine), json.loads((engine / REPORT).read_text())
    sizes = {name: round(sum(fact.bytes for fact in part) / 1e6, 2) for name, part in artifact.parts.items()}
    errors = {name: row["largest_relative"] for name, row in report["parts"].items()}
    return {"attention": artifact.attention, "mb": sizes, "errors": errors, "score": report["score"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "engines", nargs="+", type=Path, metavar="DIR", help="engines of `default`, by tdm-serve export"
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/export.jsonl")
    args = parser.parse_args()
    pipelines = {"eager": opened(None)} | {name_of(engine): opened(engine) for engine in args.engines}
    worst = {name: difference(pipelines["eager"], one) for name, one in pipelines.items()}
    if off := {name: value for name, value in worst.items() if value > 2 and "int8" not in name}:
        raise SystemExit(f"pictures differ from eager's by {off} of 255, so no timing is published")
    milliseconds: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for size in args.batches:
        contenders = {name: partial(timed, one, size) for name, one in pipelines.items()}
        measured = harness.interleaved(contenders, warmup=args.warmup, repeats=args.repeats)
        milliseconds[str(size)] = {name: harness.summarise(rounds) for name, rounds in measured.items()}
        ratios[str(size)] = {
            name: harness.ratio(measured["eager"], rounds) for name, rounds in measured.items() if name != "eager"
        }
        for name, stages in milliseconds[str(size)].items():
            print(f"batch {size}  {name:<10}" + "  ".join(f"{stage} {v['p50']:.2f}" for stage, v in stages.items()))
        for name, values in ratios[str(size)].items():
            print(f"batch {size}  eager / {name}: " + ", ".join(f"{p} {v:.2f}" for p, v in values.items()))
    info = pipelines["eager"].info
    row = {
        "model": info.id,
        "checkpoint_hash": info.checkpoint_hash,
        "size": "128x128",
        "nfe": info.nfe,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "largest_difference": worst,
        "engines": {name_of(engine): facts(engine) for engine in args.engines},
        "milliseconds": milliseconds,
        "eager_over": ratios,
    }
    harness.publish("export", row, keep=args.keep)


if __name__ == "__main__":
    main()
