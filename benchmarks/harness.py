"""What all benchmarks share: interleaved timing, percentiles, ratios pair by pair, result files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; see docs/structure.md

import numpy as np

from tdm_serve.allocator import keep_freed_memory
from tdm_serve.machine import commit, stamp

KEEPS_FREED_MEMORY = keep_freed_memory()
COMMIT = commit()  # of the code that was loaded: rows that are kept soon make the checkout a dirty one

RESULTS = Path(os.environ.get("TDM_BENCH_RESULTS") or Path(__file__).resolve().parent / "results")
PERCENTILES = (20, 50, 80)


def interleaved(
    contenders: Mapping[str, Callable[[int], Mapping[str, float]]], *, warmup: int, repeats: int
) -> dict[str, list[Mapping[str, float]]]:
    """Runs the contenders in turn, A B A B, so that a machine's drift hits them alike.

    A contender takes the index of the round and returns milliseconds by stage, "total" among them.
    """
    measured: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for index in range(-warmup, repeats):
        for name, contender in contenders.items():
            timings = contender(index)
            if index >= 0:
                measured[name].append(timings)
    return measured


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Percentiles of every stage."""
    return {stage: percentiles([timings[stage] for timings in rounds]) for stage in rounds[0]}


def ratio(of: Sequence[Mapping[str, float]], to: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Percentiles of the round-by-round ratio of totals: above 1, `of` took longer."""
    return percentiles([a["total"] / b["total"] for a, b in zip(of, to, strict=True)])


def kept(name: str) -> list[dict[str, Any]]:
    """The rows of NAME.jsonl, oldest first; none where it was never kept."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def publish(name: str, row: Mapping[str, Any], *, keep: bool) -> None:
    """Prints the row as the last line of JSON and, if `keep`, appends it to benchmarks/results/NAME.jsonl."""
    machine = stamp() | {"commit": COMMIT, "keeps_freed_memory": KEEPS_FREED_MEMORY}
    line = json.dumps({"benchmark": name, **row, "machine": machine})
    if keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
    print(line)
