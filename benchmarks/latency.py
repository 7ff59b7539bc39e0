"""End-to-end and per-stage latency of one picture, beside stock diffusers on the same weights, in one run.

Both sides: prompt to PNG bytes, the same prompts and seeds, the same dtype, threads, OpenMP policy, text length, four
steps of the same table. Before anything is timed both must make the same picture.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import numpy as np
import torch
from diffusers import ZImagePipeline

from tdm_serve import Pipeline
from tdm_serve.convert import convert
from tdm_serve.models.families.zimage_denoiser import padded_length

PROMPTS = ("two red circles", "a blue ring to the left of a yellow star", 'the word "CAT" in green', "a white cross")
Timed = Callable[[int], Mapping[str, float]]


def ours(pipeline: Pipeline, index: int) -> dict[str, float]:
    """Milliseconds by stage of one picture of ours."""
    started = time.perf_counter()
    [image] = pipeline(PROMPTS[index % len(PROMPTS)], seed=index + 100)
    made = time.perf_counter()
    image.png()
    ended = time.perf_counter()
    stages = {name: image.timings_ms[name] for name in ("text", "denoise", "decode")}
    return stages | {"png": (ended - made) * 1000, "total": (ended - started) * 1000}


def stock_picture(pipe: ZImagePipeline, index: int, text_tokens: int) -> Any:
    """One picture of stock diffusers."""
    return pipe(
        PROMPTS[index % len(PROMPTS)],
        num_inference_steps=4,
        guidance_scale=0.0,
        width=128,
        height=128,
        generator=torch.Generator("cpu").manual_seed(index + 100),
        max_sequence_length=text_tokens,
    ).images[0]


def stock(pipe: ZImagePipeline, text_tokens: int, stages: dict[str, float], index: int) -> dict[str, float]:
    """Milliseconds by stage of one picture of stock diffusers; `stages` is filled by the timed modules."""
    stages.clear()
    started = time.perf_counter()
    image = stock_picture(pipe, index, text_tokens)
    made = time.perf_counter()
    image.save(io.BytesIO(), format="PNG")
    ended = time.perf_counter()
    return {**stages, "png": (ended - made) * 1000, "total": (ended - started) * 1000}


def time_method(owner: Any, method: str, stage: str, stages: dict[str, float]) -> None:
    """Replaces `owner.method` by itself with a stopwatch."""
    inner = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            stages[stage] = stages.get(stage, 0.0) + (time.perf_counter() - started) * 1000

    setattr(owner, method, timed)


def load_stock(folder: Path, stages: dict[str, float]) -> ZImagePipeline:
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    time_method(pipe, "encode_prompt", "text", stages)
    time_method(pipe.transformer, "forward", "denoise", stages)
    time_method(pipe.vae, "decode", "decode", stages)
    return pipe


def check_same(pipeline: Pipeline, pipe: ZImagePipeline, text_tokens: int) -> int:
    """Largest difference in 8-bit values over the prompts; more than 2 ends the benchmark without a number."""
    worst = 0
    for index, prompt in enumerate(PROMPTS):
        theirs = np.asarray(stock_picture(pipe, index, text_tokens)).astype(int)
        mine = np.asarray(pipeline(prompt, seed=index + 100)[0].image).astype(int)
        worst = max(worst, int(np.abs(theirs - mine).max()))
    if worst > 2:
        raise SystemExit(f"the pictures differ by {worst} of 255, so no timing is published")
    return worst


def table(
    summaries: Mapping[str, Mapping[str, Mapping[str, float]]], ratios: Mapping[str, Mapping[str, float]]
) -> None:
    print(f"{'milliseconds':<12}{'stage':<10}{'p20':>9}{'p50':>9}{'p80':>9}")
    for name, stages in summaries.items():
        for stage, values in stages.items():
            print(f"{name:<12}{stage:<10}" + "".join(f"{values[p]:>9.2f}" for p in ("p20", "p50", "p80")))
    for name, values in ratios.items():
        print(f"diffusers / {name}, round by round: " + ", ".join(f"{p} {v:.2f}" for p, v in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/latency.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = Pipeline.from_pretrained("default", device="cpu", dtype="float32")
    text_tokens = padded_length(pipeline.info.max_prompt_tokens)
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pipe = load_stock(convert("default", Path(scratch) / "plain"), stages)
    worst = check_same(pipeline, pipe, text_tokens)
    contenders: dict[str, Timed] = {
        "tdm-serve": partial(ours, pipeline),
        "diffusers": partial(stock, pipe, text_tokens, stages),
    }
    measured = harness.interleaved(contenders, warmup=args.warmup, repeats=args.repeats)
    summaries = {name: harness.summarise(rounds) for name, rounds in measured.items()}
    ratios = {"tdm-serve": harness.ratio(measured["diffusers"], measured["tdm-serve"])}
    table(summaries, ratios)
    row = {
        "model": pipeline.info.id,
        "checkpoint_hash": pipeline.info.checkpoint_hash,
        "nfe": 4,
        "size": "128x128",
        "batch": 1,
        "dtype": "float32",
        "text_tokens": text_tokens,
        "repeats": args.repeats,
        "largest_difference": worst,
        "milliseconds": summaries,
        "diffusers_over_ours": ratios["tdm-serve"],
    }
    harness.publish("latency", row, keep=args.keep)


if __name__ == "__main__":
    main()
