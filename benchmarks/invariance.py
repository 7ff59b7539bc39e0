"""What it costs that a picture never depends on its company, and what sharing saves: one table, one line of JSON.

Strict mode (text encoded and pictures decoded one at a time) against batches; versions mixed in one evaluation against
an evaluation each; text from the cache against text that is encoded; previews against pictures. Pictures are compared
before anything is timed, and mixed versions must agree bit by bit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import harness  # first: it sets the OpenMP policy before torch loads
import numpy as np
import torch

from tdm_serve.core import Request
from tdm_serve.engine import Engine

PROMPTS = ("two red circles", "a blue ring to the left of a yellow star", 'the word "CAT" in green', "a white cross")
MODELS = ("default", "default-tdm")
Timed = Callable[[int], Mapping[str, float]]


def requests(count: int, index: int = 0, models: Sequence[str] = MODELS[:1]) -> list[Request]:
    """Pictures of the default size; consecutive rounds have other seeds."""
    return [
        Request(PROMPTS[i % len(PROMPTS)], 1000 + index * count + i, 128, 128, model=models[i % len(models)])
        for i in range(count)
    ]


def pixels(engine: Engine, asked: Sequence[Request], *, alone: bool = False) -> np.ndarray:
    """8-bit values (B, H, W, 3), made together or one by one."""
    groups = [[one] for one in asked] if alone else [asked]
    return np.stack([np.asarray(i.image).astype(int) for group in groups for i in engine.generate(group)])


def picture_ms(engine: Engine, count: int, index: int) -> dict[str, float]:
    """Milliseconds a picture of a batch, by stage, with every prompt encoded."""
    engine.cache.clear()
    started = time.perf_counter()
    [first, *_] = engine.generate(requests(count, index))
    total = (time.perf_counter() - started) * 1000
    stages = {name: first.timings_ms[name] / count for name in ("text", "denoise", "decode")}
    return stages | {"total": total / count}


def step_ms(engine: Engine, models: Sequence[str], groups: Callable[[Request], str], index: int) -> dict[str, float]:
    """Milliseconds of one evaluation of four pictures, in as many forwards as there are groups."""
    samples = engine.start(requests(4, index, models))
    parts: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        parts.setdefault(groups(sample.request), []).append(place)
    started = time.perf_counter()
    for places in parts.values():
        engine.step([samples[place] for place in places])
    return {"total": (time.perf_counter() - started) * 1000}


def start_ms(engine: Engine, kept: bool, index: int) -> dict[str, float]:
    """Milliseconds to start one picture whose text is kept or not."""
    asked = requests(1, index)
    engine.start(asked)
    if not kept:
        engine.cache.clear()
    started = time.perf_counter()
    engine.start(asked)
    return {"total": (time.perf_counter() - started) * 1000}


def preview_ms(engine: Engine, latents: torch.Tensor, _: int) -> dict[str, float]:
    started = time.perf_counter()
    engine.preview(latents)
    return {"total": (time.perf_counter() - started) * 1000}


def differences(strict: Engine, loose: Engine, half: Engine) -> dict[str, dict[str, float]]:
    """Largest and mean difference in 8-bit values over eight pictures of two versions."""
    asked = requests(8, 1, MODELS)
    reference = pixels(strict, asked, alone=True)
    pairs = {
        "strict, in a batch": pixels(strict, asked) - reference,
        "not strict, in a batch": pixels(loose, asked) - reference,
        "bfloat16, in a batch against alone": pixels(half, asked) - pixels(half, asked, alone=True),
        "bfloat16 against float32": pixels(half, asked, alone=True) - reference,
    }
    return {
        name: {"max": int(np.abs(pair).max()), "mean": round(float(np.abs(pair).mean()), 4)}
        for name, pair in pairs.items()
    }


def contenders(strict: Engine, loose: Engine) -> dict[str, Timed]:
    """Everything that is timed, in turn."""
    latents = strict.start(requests(1))[0].latents
    timed: dict[str, Timed] = {}
    for count in (1, 4, 8):
        timed[f"strict, batch {count}"] = partial(picture_ms, strict, count)
        timed[f"not strict, batch {count}"] = partial(picture_ms, loose, count)
    return timed | {
        "step of 4, one version": partial(step_ms, strict, MODELS[:1], lambda _: ""),
        "step of 2 + 2, versions mixed": partial(step_ms, strict, MODELS, lambda _: ""),
        "steps of 2 and 2, versions apart": partial(step_ms, strict, MODELS, lambda request: request.model),
        "start, text encoded": partial(start_ms, strict, False),
        "start, text from the cache": partial(start_ms, strict, True),
        "preview": partial(preview_ms, strict, latents),
    }


def derived(summaries: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """What the table is for: ratios of the 20th percentiles, which other users of the machine disturb least."""

    def percent(of: str, to: str) -> float:
        return round(summaries[of]["total"]["p20"] / summaries[to]["total"]["p20"] * 100, 2)

    costs = {
        f"strict_over_not_percent_batch_{n}": percent(f"strict, batch {n}", f"not strict, batch {n}") for n in (4, 8)
    }
    return costs | {
        "mixed_over_apart_percent": percent("step of 2 + 2, versions mixed", "steps of 2 and 2, versions apart"),
        "mixed_over_one_version_percent": percent("step of 2 + 2, versions mixed", "step of 4, one version"),
        "cached_start_percent_of_encoded": percent("start, text from the cache", "start, text encoded"),
        "preview_percent_of_a_picture": percent("preview", "strict, batch 1"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/invariance.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    strict = Engine.load(MODELS, device="cpu", dtype="float32", strict=True)
    loose = Engine.load(MODELS, device="cpu", dtype="float32", strict=False)
    different = differences(strict, loose, Engine.load(MODELS, device="cpu", dtype="bfloat16"))
    if different["strict, in a batch"]["max"]:
        raise SystemExit("pictures changed with their company in strict mode, so no timing is published")
    measured = harness.interleaved(contenders(strict, loose), warmup=args.warmup, repeats=args.repeats)
    print(f"{'milliseconds':<36}{'p20':>9}{'p50':>9}{'p80':>9}")
    summaries = {name: harness.summarise(rounds) for name, rounds in measured.items()}
    for name, stages in summaries.items():
        print(f"{name:<36}" + "".join(f"{stages['total'][p]:>9.2f}" for p in ("p20", "p50", "p80")))
    for name, values in different.items():
        print(f"{name:<36}largest difference {values['max']} of 255, mean {values['mean']}")
    shown = derived(summaries)
    for name, value in shown.items():
        print(f"{name:<44}{value:>8}")
    row = {
        "models": MODELS,
        "size": "128x128",
        "repeats": args.repeats,
        "load_average": round(os.getloadavg()[0], 1),  # others on the machine make times longer, ratios hardly
        "differences": different,
        "milliseconds": summaries,
        **shown,
    }
    harness.publish("invariance", row, keep=args.keep)


if __name__ == "__main__":
    main()
