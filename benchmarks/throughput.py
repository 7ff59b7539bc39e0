"""Pictures a second by backend, size and batch: prompt to PNG, and the denoiser alone.

The default checkpoint, or another (`--model`); engines by `tdm-serve export` besides eager and compiled torch. Before a
cell is timed its pictures must be eager's of the same batch, within 2 of 255; a cell whose pictures are not has
`failed` with the reason, and no speed. An int8 engine makes other pictures that score alike, so it must have been
verified by its export instead. Prompts are others in every batch
and not cached, and backends take turns, batch by batch. A row is one run; its `cells` have `backend`, `size`, `batch`,
`nfe`, and per batch `milliseconds` from prompt to PNG and `denoise_milliseconds` (p20, p50, p80), from whose medians
come `pictures_per_second` and `denoise_per_second`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import numpy as np

from tdm_finetune.scenes.prompts import prompts as scene_prompts
from tdm_serve.artifact import read_artifact
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import TdmServeError
from tdm_serve.pipeline import Pipeline

CLOSE = 2  # of 255
PROMPTS = [prompt.text for prompt, _ in zip(scene_prompts("train", seed=11), range(256), strict=False)]

Cell = dict[str, Any]


def opened(model: str, device: str, backend: str, engine: Path | None = None) -> Pipeline:
    """Without a prompt cache, so that every picture pays for its text."""
    return Pipeline(Engine.load(model, device=device, backend=backend, engine=engine, cache_mb=0))


def pipelines(model: str, device: str, engines: list[Path], compiled: bool) -> dict[str, Pipeline]:
    """Every backend by name; eager first."""
    found = {"eager": opened(model, device, "eager")}
    if compiled:
        found["compiled"] = opened(model, device, "compiled")
    for engine in engines:
        artifact = read_artifact(engine)
        name = artifact.kind if artifact.quantise == "none" else f"{artifact.kind} {artifact.quantise}"
        if artifact.quantise != "none" and not artifact.report:
            raise SystemExit(f"{engine} is {artifact.quantise} and was not verified; export it without --no-verify")
        found[name] = opened(model, device, "auto", engine)
    return found


def requests(size: int, batch: int, index: int) -> list[Request]:
    """One batch, other prompts and seeds in every round."""
    return [
        Request(PROMPTS[(index * batch + i) % len(PROMPTS)], 100 + index * batch + i, size, size) for i in range(batch)
    ]


def timed(pipeline: Pipeline, size: int, batch: int, index: int) -> Mapping[str, float]:
    """Milliseconds of one batch from prompts to PNGs, and of its evaluations."""
    asked = requests(size, batch, index)
    started = time.perf_counter()
    images = pipeline.generate(asked)
    for image in images:
        image.png()
    spent = (time.perf_counter() - started) * 1000
    return {"denoise": images[0].timings_ms["denoise"], "total": spent}


def obstacle(eager: Pipeline, name: str, pipeline: Pipeline, size: int, batch: int) -> str | None:
    """Why a cell is not timed, or None."""
    asked = requests(size, batch, 0)
    try:
        mine = pipeline.generate(asked)
    except TdmServeError as error:
        return str(error)
    pairs = zip(eager.generate(asked), mine, strict=True)
    off = max(int(np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int)).max()) for a, b in pairs)
    return f"differs from eager by {off} of 255" if off > CLOSE and "int8" not in name else None


def cells_of(sides: Mapping[str, Pipeline], size: int, batch: int, warmup: int, repeats: int) -> list[Cell]:
    """One size and batch on every backend."""
    cells: list[Cell] = []
    contenders: dict[str, Callable[[int], Mapping[str, float]]] = {}
    for name, pipeline in sides.items():
        if (why := obstacle(sides["eager"], name, pipeline, size, batch)) is not None:
            cells.append({"backend": name, "size": size, "batch": batch, "failed": why})
        else:
            contenders[name] = partial(timed, pipeline, size, batch)
    for name, rounds in harness.interleaved(contenders, warmup=warmup, repeats=repeats).items():
        spread = harness.summarise(rounds)
        [image, *_] = sides[name].generate(requests(size, batch, 0))
        cells.append(
            {
                "backend": name,
                "size": size,
                "batch": batch,
                "nfe": image.nfe,
                "milliseconds": spread["total"],
                "denoise_milliseconds": spread["denoise"],
                "pictures_per_second": round(batch * 1000 / spread["total"]["p50"], 3),
                "denoise_per_second": round(batch * 1000 / spread["denoise"]["p50"], 3),
            }
        )
    return cells


def line(cell: Cell) -> str:
    """One line of the table."""
    start = f"{cell['backend']:<12}{cell['size']:>6}{cell['batch']:>7}"
    if "failed" in cell:
        return f"{start}  not timed: {cell['failed']}"
    return f"{start}{cell['nfe']:>5}{cell['pictures_per_second']:>12.2f}{cell['denoise_per_second']:>14.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "engines", nargs="*", type=Path, metavar="DIR", help="engines of the model, by tdm-serve export"
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--compiled", action="store_true", help="compiled torch, too; it needs a C++ compiler")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/throughput.jsonl")
    arguments = parser.parse_args()
    sides = pipelines(arguments.model, arguments.device, arguments.engines, arguments.compiled)
    print(f"{'backend':<12}{'size':>6}{'batch':>7}{'NFE':>5}{'pictures/s':>12}{'denoise only':>14}")
    cells: list[Cell] = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            found = cells_of(sides, size, batch, arguments.warmup, arguments.repeats)
            print("\n".join(line(cell) for cell in found), flush=True)
            cells += found
    harness.publish(
        "throughput",
        {"model": arguments.model, "repeats": arguments.repeats, "cells": cells},
        keep=arguments.keep,
    )


if __name__ == "__main__":
    main()
