"""Does it pay to put prompts of several padded lengths into one forward? One table, one line of JSON.

One evaluation of pictures whose texts have 32 and 64 (or 96) padded tokens: in one forward, where the shorter texts are
filled up and the filling is attended by nobody, against a forward for each length. The rows must agree before anything
is timed: bit by bit on a CPU, within rounding elsewhere.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial

import harness  # first: it sets the OpenMP policy before torch loads
import torch
from torch import Tensor

from tdm_serve.models.families.attention import ragged
from tdm_serve.models.families.base import Family
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.load import load

PROMPT = "two red circles"
SIDES = (128, 256)
COMPANIES: tuple[tuple[int, ...], ...] = ((32, 64), (32, 32, 64, 64), (32, 32, 32, 64), (32, 32, 96, 96))
Inputs = tuple[Tensor, Tensor, list[Tensor]]


def inputs(model: ZImage, side: int, lengths: Sequence[int]) -> Inputs:
    """Latents, modulation and texts of pictures at different steps."""
    latents = torch.cat([model.noise(seed, side, side) for seed in range(len(lengths))]).to(model.dtype)
    modulation = torch.cat([model.modulation((1.0, 0.9, 0.75, 0.5)[i % 4]) for i in range(len(lengths))])
    return latents, modulation, [model.condition(PROMPT, length) for length in lengths]


def together(model: Family, given: Inputs) -> Tensor:
    latents, modulation, texts = given
    text, lengths = ragged(texts, [text.shape[1] for text in texts])
    return model.denoiser(latents, modulation, text, (), lengths)


def apart(model: Family, given: Inputs) -> Tensor:
    """Rows come sorted by length."""
    latents, modulation, texts = given
    counts = [text.shape[1] for text in texts]
    parts, start = [], 0
    for length in sorted(set(counts)):
        rows = slice(start, start + counts.count(length))
        parts.append(model.denoiser(latents[rows], modulation[rows], torch.cat(texts[rows])))
        start = rows.stop
    return torch.cat(parts)


def timed(model: Family, way: str, given: Inputs, _: int) -> Mapping[str, float]:
    started = time.perf_counter()
    (together if way == "together" else apart)(model, given)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return {"total": (time.perf_counter() - started) * 1000}


def check(model: Family, given: Inputs) -> float:
    """The largest relative difference between both ways; more than rounding ends the benchmark without a number."""
    mixed, plain = together(model, given).float(), apart(model, given).float()
    worst = float((mixed - plain).abs().max() / plain.abs().max())
    if worst > (0.0 if model.device.type == "cpu" and model.dtype == torch.float32 else 0.02):
        raise SystemExit(f"rows change by {worst:.2g} with the length of their company, so no timing is published")
    return worst


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/mixing.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load("default", args.device, args.dtype).model
    assert isinstance(model, ZImage)
    rows: list[dict[str, object]] = []
    print(f"{'size':<6}{'text tokens':<20}{'apart p20':>12}{'together p20':>14}{'together/apart p50':>20}")
    for side in SIDES:
        for lengths in COMPANIES:
            given = inputs(model, side, lengths)
            worst = check(model, given)
            ways = {way: partial(timed, model, way, given) for way in ("apart", "together")}
            measured = harness.interleaved(ways, warmup=args.warmup, repeats=args.repeats)
            shown = {way: harness.summarise(rounds)["total"] for way, rounds in measured.items()}
            ratio = harness.ratio(measured["together"], measured["apart"])
            name = " ".join(map(str, lengths))
            print(
                f"{side:<6}{name:<20}{shown['apart']['p20']:>12.2f}{shown['together']['p20']:>14.2f}{ratio['p50']:>20.3f}"
            )
            rows.append({"side": side, "lengths": lengths, "difference": worst, **shown, "together_over_apart": ratio})
    row = {
        "model": model.spec.id,
        "device": args.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": args.threads,
        "repeats": args.repeats,
        "load_average": round(os.getloadavg()[0], 1),
        "cases": rows,
    }
    harness.publish("mixing", row, keep=args.keep)


if __name__ == "__main__":
    main()
