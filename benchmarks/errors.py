"""What wrong pictures get wrong: the share of a category's pictures whose first error is one of five.

In this order: `number` (more or fewer objects than asked for), `twice` (one of two things is there twice and the other
is not), `shape` (an object without a name, or with a wrong one), `colour`, and `place` (a relation that does not hold,
letters out of line).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads

from tdm_finetune.evaluate import evaluate
from tdm_finetune.evaluate_cli import method_of
from tdm_finetune.scenes import CATEGORIES, Split, Verdict
from tdm_finetune.scenes.check import Seen
from tdm_finetune.scenes.world import Spec, Thing
from tdm_serve import Pipeline

ERRORS = ("number", "twice", "shape", "colour", "place")


def first_error(verdict: Verdict, spec: Spec) -> str | None:
    """The first of ERRORS that a picture has; None if it is right."""
    if verdict.strict:
        return None
    seen = verdict.seen
    if len(seen) != spec.objects:
        return "number"
    if spec.word is not None:
        wanted = [Thing(letter, spec.colour) for letter in spec.word]
        orders: Sequence[tuple[Seen, ...]] = (seen,)
    else:
        wanted = list(spec.things * spec.count)
        orders = list(permutations(seen))
    named = [order for order in orders if all(s.name == t.shape for s, t in zip(order, wanted, strict=True))]
    if not named:
        names = {s.name for s in seen}
        return "twice" if len(spec.things) == 2 and len(names) == 1 and names < {t.shape for t in wanted} else "shape"
    coloured = any(
        all(s.colour is not None and t.colour in (None, s.colour) for s, t in zip(order, wanted, strict=True))
        for order in named
    )
    return "place" if coloured else "colour"


def measure(model: str, split: Split, n: int, steps: int | None) -> dict[str, Any]:
    """The shares of errors by category."""
    pipeline = Pipeline.from_pretrained(model)
    found = evaluate(pipeline, split, n, steps=steps, allow_untrained_schedule=True, repeats=None, second_judge=False)
    counts: dict[str, Counter[str | None]] = {name: Counter() for name in CATEGORIES}
    for verdict, prompt in zip(found.verdicts, found.prompts, strict=True):
        counts[prompt.spec.category][first_error(verdict, prompt.spec)] += 1
    shares = {
        name: {error: round(count[error] / count.total(), 4) for error in ERRORS} for name, count in counts.items()
    }
    said = {"untrained_schedule": True} if found.untrained_schedule else {}
    return {"model": model, **method_of(model), "split": split, "n": n, "nfe": found.nfe, **said, "errors": shares}


def table(row: dict[str, Any]) -> str:
    """Category by kind of error."""
    lines = [f"{row['model']}, {row['nfe']} evaluations", f"{'category':<14}" + "".join(f"{e:>8}" for e in ERRORS)]
    lines += [f"{name:<14}" + "".join(f"{s[e]:>8.3f}" for e in ERRORS) for name, s in row["errors"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--split", choices=("val", "heldout"), default="val")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--steps", type=int, help="another number of steps than the checkpoint's own")
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/errors.jsonl")
    args = parser.parse_args()
    row = measure(args.model, args.split, args.n, args.steps)
    print(table(row))
    harness.publish("errors", row, keep=args.keep)


if __name__ == "__main__":
    main()
