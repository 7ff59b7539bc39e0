"""Score against network evaluations: the multi-step teacher beside its students, TDM and TDM-R1.

Strict and soft score of the exact checker on the same prompts and seeds. Evaluations are counted at the denoiser, not
asked for: the guided teacher spends two a step. A count that a student was not trained for is marked `untrained`. Rows
of `results/quality.jsonl` are one model at one count: `steps`, `guidance` (the weight; 1 is off), `nfe`, `untrained`,
`n`, `strict` with the 95 % Wilson interval `strict_low` to `strict_high`, `soft`, `palette_error`, `categories`. With
`--keep`, what is there for the same weights and prompts is not measured again, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads

from tdm_finetune.evaluate import evaluate
from tdm_finetune.scenes import SPLITS, Split
from tdm_serve import Pipeline

# Steps and guidance of every model. The teacher's guided steps cost two evaluations each.
GUIDED, OFF = 3.0, 1.0
CELLS = {
    "default-teacher": [
        *((steps, GUIDED) for steps in (2, 4, 8, 13, 25)),
        *((steps, OFF) for steps in (4, 8, 16, 25, 50)),
    ],
    "default-tdm": [(steps, OFF) for steps in (1, 2, 4, 8)],
    "default": [(steps, OFF) for steps in (1, 2, 4, 8)],
}
QUANTILE = 1.959964  # of the normal distribution, for 95 %


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `n` independent trials."""
    spread = QUANTILE**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = QUANTILE / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def measure(pipeline: Pipeline, steps: int, guidance: float, split: Split, n: int) -> dict[str, Any]:
    """One row."""
    found = evaluate(
        pipeline,
        split,
        n,
        steps=steps,
        guidance=guidance,
        allow_untrained_schedule=True,
        repeats=None,
        second_judge=False,
    )
    expected = steps * (2 if guidance != OFF else 1)
    if found.nfe != expected:
        raise AssertionError(f"{pipeline.info.id} counted {found.nfe} evaluations; {steps} steps have {expected}")
    row = found.summary()
    low, high = wilson(row["strict"], n)
    kept = ("model", "checkpoint_hash", "split", "seed", "guidance", "nfe", "n", "strict", "soft")
    return {name: row[name] for name in kept} | {
        "steps": steps,
        "untrained": found.untrained_schedule,
        "strict_low": low,
        "strict_high": high,
        "palette_error": row["palette_error"],
        "categories": row["categories"],
    }


def known(split: Split, n: int) -> set[tuple[Any, ...]]:
    """What has been measured: weights, steps, guidance."""
    rows = harness.kept("quality")
    return {(r["checkpoint_hash"], r["steps"], r["guidance"]) for r in rows if (r["split"], r["n"]) == (split, n)}


def todo(models: list[str], most: int | None) -> Iterator[tuple[str, int, float]]:
    """The cells of the models, of at most so many steps."""
    for model in models:
        yield from ((model, steps, weight) for steps, weight in CELLS[model] if most is None or steps <= most)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    interval = f"{row['strict_low']:.3f} to {row['strict_high']:.3f}"
    note = "  untrained" if row["untrained"] else ""
    return f"{row['model']:<18}{row['nfe']:>5}{row['guidance']:>10g}{row['strict']:>8.3f}  {interval}{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--n", type=int, default=512, help="prompts (default: 512)")
    parser.add_argument("--most-steps", type=int, help="leave out what has more steps")
    parser.add_argument("--keep", action="store_true", help="append the rows to benchmarks/results/quality.jsonl")
    arguments = parser.parse_args()
    done = known(arguments.split, arguments.n) if arguments.keep else set()
    pipelines: dict[str, Pipeline] = {}
    print(f"{'model':<18}{'NFE':>5}{'guidance':>10}{'strict':>8}  95 % interval")
    for model, steps, weight in todo(arguments.models, arguments.most_steps):
        if model not in pipelines:
            pipelines[model] = Pipeline.from_pretrained(model)
        pipeline = pipelines[model]
        if (pipeline.info.checkpoint_hash, steps, weight) in done:
            continue
        row = measure(pipeline, steps, weight, arguments.split, arguments.n)
        print(line(row), flush=True)
        harness.publish("quality", row, keep=arguments.keep)


if __name__ == "__main__":
    main()
