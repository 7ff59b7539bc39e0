"""The published models at full size with random weights on a GPU, beside their peers, at 512 and 1024.

Nothing is downloaded and no picture means anything; shapes alone decide these numbers. Every cell (a model, the type of
its weights, a size, a batch) is a run of latency.py in a process of its own with a time limit, and its row is kept as
soon as it is there: a run that is cut short loses one cell, and `--skip-kept` goes on where it stopped. At the end the
targets are stated as measured. One command on a GPU machine:

    python benchmarks/fullsize.py --fp8 --keep --skip-kept
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fullsize_targets
import harness  # first: it sets the OpenMP policy before torch loads
import torch

MODELS = ("zimage-tdm-r1", "sd35-medium-tdm", "dreamshaper7-tdm")
SIZES = ("1024x1024", "512x512")
BATCHES = (1, 2, 4, 8)
LIMIT_S = 600  # of one cell
TOTAL = "total"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One process."""

    model: str
    quantise: str
    size: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}, {self.quantise}, {self.size}, batch {self.batch}"


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What the targets are about comes first."""
    for batch in args.batch or BATCHES:
        for size in args.size or SIZES:
            for model in args.model or MODELS:
                for quantise in ("none", "fp8") if args.fp8 else ("none",):
                    yield Cell(model, quantise, size, batch)


def asked(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The command that measures one cell."""
    command = [sys.executable, str(Path(__file__).with_name("latency.py")), "--random-weights", "--name", "fullsize"]
    command += ["--model", cell.model, "--quantise", cell.quantise, "--size", cell.size, "--batch", str(cell.batch)]
    command += ["--device", args.device, "--dtype", args.dtype, "--repeats", str(args.repeats)]
    command += ["--warmup", str(args.warmup), "--peers", *args.peers]
    return command if args.compiled else [*command, "--no-compiled"]


def measured(cell: Cell, args: argparse.Namespace) -> Row | None:
    """One row; None, with the reason on stderr, where it could not be made."""
    try:
        done = subprocess.run(asked(cell, args), capture_output=True, text=True, timeout=args.limit_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"{cell}: not done within {args.limit_s} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{cell}: {(done.stderr.strip() or 'no reason was given').splitlines()[-1]}", file=sys.stderr)
        return None
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines), flush=True)
    return row_of(cell, json.loads(last))


def row_of(cell: Cell, found: Row) -> Row:
    """What latency.py measured, with one entry of `rows` for each of our backends, and without its machine."""
    width, height = map(int, cell.size.split("x"))
    ours = {name: stages for name, stages in found["milliseconds"].items() if name in fullsize_targets.OURS}
    rows = [
        {
            "backend": "compiled" if name.endswith("compiled") else "eager",
            "width": width,
            "height": height,
            "batch": cell.batch,
            "nfe": found["nfe_counted"][name],
            "ms": {stage: values["p50"] for stage, values in stages.items()},
            "images_per_second": round(cell.batch * 1000 / stages[TOTAL]["p50"], 3),
            "memory_mb": found["memory_mb"],
        }
        for name, stages in ours.items()
    ]
    kept = {key: value for key, value in found.items() if key not in ("benchmark", "machine")}
    return {**kept, "backend": "+".join(row["backend"] for row in rows), "rows": rows}


def known(device: str) -> list[Row]:
    """Kept rows of this device."""
    return [row for row in harness.kept("fullsize") if row["machine"]["device"] == device]


def has(rows: list[Row], cell: Cell) -> bool:
    key = (cell.model.partition(":")[0], cell.quantise, cell.size, cell.batch)
    return any((row["model"], row["quantise"], row["size"], row["batch"]) == key for row in rows)


def run(args: argparse.Namespace) -> int:
    """1 where a cell failed; the others are measured all the same."""
    rows = known(torch.cuda.get_device_name()) if args.skip_kept and args.device != "cpu" else []
    failed = 0
    for cell in cells(args):
        if has(rows, cell):
            continue
        row = measured(cell, args)
        failed += row is None
        if row is not None:
            rows.append(row)
            harness.publish("fullsize", row, keep=args.keep)
    print("\n".join(fullsize_targets.stated(rows)))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"catalogue id (default: {', '.join(MODELS)})")
    parser.add_argument("--size", action="append", metavar="WxH", help=f"(default: {', '.join(SIZES)})")
    parser.add_argument("--batch", action="append", type=int, help=f"(default: {', '.join(map(str, BATCHES))})")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu is for trying this script")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fp8", action="store_true", help="a second row of each cell with fp8 weights")
    parser.add_argument("--peers", nargs="*", default=["diffusers", "compile", "cudnn"], help="as in latency.py")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="ours compiled, too")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--limit-s", type=int, default=LIMIT_S, help="for one cell")
    parser.add_argument("--skip-kept", action="store_true", help="leave out what this device has a kept row of")
    parser.add_argument("--keep", action="store_true", help="append rows to benchmarks/results/fullsize.jsonl")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch sees none; `tdm-serve bench` measures on a CPU", file=sys.stderr)
        return 2
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
