"""The published models at full size with random weights on a GPU: load, memory, milliseconds a stage, at 512 and 1024.

Nothing is downloaded and no picture means anything; shapes alone decide these numbers. Each model runs in a process of
its own, as `tdm-serve bench` does, and its row is kept as soon as it is there, so a run that is cut short loses little
and `--skip-kept` goes on where it stopped. One command on a GPU machine:

    python benchmarks/fullsize.py --keep
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import torch

MODELS = ("zimage-tdm-r1", "sd35-medium-tdm", "dreamshaper7-tdm")
SIZES = ("512x512", "1024x1024")
BATCHES = (1, 2, 4, 8)
LIMIT_S = 600  # of one model


def asked(model: str, quantise: str, args: argparse.Namespace) -> list[str]:
    """The command that measures one model."""
    command = [sys.executable, "-m", "tdm_serve.cli", "bench", "--model", model, "--random-weights", "--json"]
    command += ["--device", args.device, "--quantise", quantise, "--backend", args.backend]
    command += ["--repeats", str(args.repeats)]
    for size in args.size or SIZES:
        command += ["--size", size]
    for batch in args.batch or BATCHES:
        command += ["--batch", str(batch)]
    return command


def measured(model: str, quantise: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """One row; None, with the reason on stderr, where it could not be made."""
    try:
        done = subprocess.run(
            asked(model, quantise, args), capture_output=True, text=True, timeout=args.limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{model}, {quantise}: not done within {args.limit_s} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{model}, {quantise}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def kept(model: str, quantise: str, device: str) -> bool:
    """Whether a row of the same model on the same device is there already."""
    path = harness.RESULTS / "fullsize.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return any((row["model"], row["quantise"], row["machine"]["device"]) == (model, quantise, device) for row in rows)


def table(row: dict[str, Any]) -> str:
    """One line for each size and batch."""
    lines = [f"{row['model']}, {row['dtype']}, {row['quantise']}: {row['load_s']} s, {row['model_mb'] / 1024:.1f} GB"]
    if "fp8_relative_error" in row:
        lines.append(f"fp8 changes the output by {row['fp8_relative_error']:.2%} (random weights)")
    for one in row["rows"]:
        ms = ", ".join(f"{stage} {one['ms'][stage]:.1f}" for stage in ("text", "denoise", "decode", "png", "total"))
        size = f"{one['width']}x{one['height']} x {one['batch']}"
        lines.append(
            f"  {size:<16} {one['evaluation_ms']:.1f} ms an evaluation; {ms} ms; "
            f"{one['images_per_second']} images/s; {one['memory_mb'] / 1024:.1f} GB"
        )
    return "\n".join(lines)


def run(models: Sequence[str], args: argparse.Namespace) -> int:
    device = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    failed = 0
    for model in models:
        for quantise in ("none", "fp8") if args.fp8 else ("none",):
            if args.skip_kept and kept(model, quantise, device):
                continue
            row = measured(model, quantise, args)
            failed += row is None
            if row is not None:
                print(table(row))
                harness.publish("fullsize", {key: row[key] for key in row if key != "benchmark"}, keep=args.keep)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"catalogue id (default: {', '.join(MODELS)})")
    parser.add_argument("--size", action="append", metavar="WxH", help=f"(default: {', '.join(SIZES)})")
    parser.add_argument("--batch", action="append", type=int, help=f"(default: {', '.join(map(str, BATCHES))})")
    parser.add_argument("--backend", default="eager", help="eager or compiled")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu is for trying this script")
    parser.add_argument("--fp8", action="store_true", help="a second row of each model with fp8 weights")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit-s", type=int, default=LIMIT_S, help="for one model")
    parser.add_argument("--skip-kept", action="store_true", help="leave out what this device has a kept row of")
    parser.add_argument("--keep", action="store_true", help="append rows to benchmarks/results/fullsize.jsonl")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch sees none; `tdm-serve bench` measures on a CPU", file=sys.stderr)
        return 2
    return run(args.model or MODELS, args)


if __name__ == "__main__":
    sys.exit(main())
