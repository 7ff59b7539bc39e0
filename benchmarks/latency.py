"""Latency by stage beside the peers of the same run, on the same weights, and the share of the roofline reached.

All sides: prompts to PNG bytes, the same prompts, noise, type, size, batch, threads, OpenMP policy and schedule, no
prompt cached, evaluations counted at the network. They take turns, round by round. Before anything is timed a contender
must make the pictures of this project's eager engine; one that does not, or cannot run, is absent with the reason.
A row is one size and batch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import peers
import roofline
import torch
from stock import load_stock

from tdm_serve.bench import MIB, peak_mb
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import TdmServeError
from tdm_serve.models.families.zimage_denoiser import padded_length
from tdm_serve.models.load import load
from tdm_serve.validation import parse_size

PROMPTS = ("two red circles", "a blue ring to the left of a yellow star", 'the word "CAT" in green', "a white cross")
OURS = "tdm-serve"
PEERS = ("diffusers", "compile", "autotune", "cudnn", "onnx")
STAGES = ("text", "denoise", "decode")

Row = dict[str, Any]


def batch_of(size: tuple[int, int], batch: int, index: int) -> list[Request]:
    """Other prompts and seeds in every round."""
    numbers = range(index * batch, (index + 1) * batch)
    return [Request(PROMPTS[number % len(PROMPTS)], 100 + number, *size) for number in numbers]


class Bench:
    """One model and its peers in memory; a row for each size and batch."""

    def __init__(self, args: argparse.Namespace, engines: Sequence[Path]) -> None:
        self.args, self.absent = args, dict[str, str]()
        memory: Any = {"random_weights": args.random_weights, "quantise": args.quantise}
        before = allocated()
        loaded = load(args.model, args.device, args.dtype, **memory)
        self.engine = Engine(loaded, "eager", cache_mb=0)
        self.model = self.engine.model
        self.held_mb = allocated() - before
        self.contenders = {OURS: peers.ours(self.engine)}
        if args.compiled:
            self.offer(f"{OURS} compiled", lambda: peers.ours(Engine(loaded, "compiled", cache_mb=0)))
        if "diffusers" in args.peers:
            stock = load_stock(args.model, self.model, random=args.random_weights)
            self.contenders |= peers.of_stock(stock, args.peers, self.absent)
        self.contenders |= peers.exported(engines, args.model, self.absent)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.ceilings = roofline.ceilings(self.model.device.type, self.model.dtype)

    def offer(self, name: str, make: Callable[[], peers.Contender]) -> None:
        try:
            self.contenders[name] = make()
        except TdmServeError as error:
            self.absent[name] = str(error)

    def row(self, size: tuple[int, int], batch: int) -> Row:
        """One size and batch; what is absent has its reason."""
        torch.compiler.reset()  # it gives up on a function that it compiled for many shapes
        first, absent = batch_of(size, batch, 0), dict(self.absent)
        precision = self.args.quantise if self.args.quantise != "none" else self.dtype
        memory_mb = self.memory(first)
        kept, off, counted = peers.checked(self.contenders, OURS, first, precision, absent)
        timed = {name: partial(self.round, one, size, batch) for name, one in kept.items()}
        measured = harness.interleaved(timed, warmup=self.args.warmup, repeats=self.args.repeats)
        costs = roofline.stage_costs(self.engine, first)
        summaries = {name: harness.summarise(rounds) for name, rounds in measured.items()}
        medians = {stage: values["p50"] for stage, values in summaries[OURS].items()}
        others = [name for name in kept if name != OURS]
        return {
            "size": f"{size[0]}x{size[1]}",
            "batch": batch,
            "milliseconds": summaries,
            "ratios": {name: harness.ratio(measured[name], measured[OURS]) for name in others},
            "nfe": counted[OURS],
            "nfe_counted": counted,
            "largest_difference": max(off[name][0] for name in kept),
            "mean_difference": round(max(off[name][1] for name in kept), 3),
            "roofline": roofline.shares({stage: costs[stage] for stage in STAGES}, medians, self.ceilings),
            "evaluation": {"flops": costs["evaluation"].flops, "bytes": costs["evaluation"].bytes},
            "ceilings": self.ceilings,
            "absent": absent,
            "memory_mb": round(memory_mb, 1),
        }

    @staticmethod
    def round(contender: peers.Contender, size: tuple[int, int], batch: int, index: int) -> Mapping[str, float]:
        return contender.round(batch_of(size, batch, index + 1000))  # warm-up counts from below zero

    def memory(self, requests: Sequence[Request]) -> float:
        """Our peak: weights and what a batch adds, without the peers. On a CPU it is the process's."""
        if self.model.device.type != "cuda":
            self.engine.generate(requests)
            return peak_mb(self.engine)
        torch.cuda.reset_peak_memory_stats()
        before = allocated()
        self.engine.generate(requests)
        return self.held_mb + torch.cuda.max_memory_allocated() / MIB - before

    def about(self) -> Row:
        info = self.engine.info
        tokens = info.max_prompt_tokens
        return {
            "model": info.id,
            "checkpoint_hash": info.checkpoint_hash,
            "random_weights": self.args.random_weights,
            "quantise": self.args.quantise,
            "dtype": self.dtype,
            "text_tokens": padded_length(tokens) if info.family == "zimage" else tokens,
            "repeats": self.args.repeats,
        }

    def rows(self) -> Iterator[Row]:
        for size in map(parse_size, self.args.size or [f"{self.engine.info.width}x{self.engine.info.height}"]):
            for batch in self.args.batch or (1, 2, 4):
                yield self.about() | self.row(size, batch)


def allocated() -> float:
    """MiB on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0


def table(row: Row) -> str:
    """For people."""
    lines = [
        f"{row['model']}, {row['size']}, batch {row['batch']}, {row['dtype']}, {row['nfe']} evaluations a picture",
        f"{'milliseconds':<26}{'stage':<10}{'p20':>10}{'p50':>10}{'p80':>10}",
    ]
    for name, stages in row["milliseconds"].items():
        for stage, values in stages.items():
            lines.append(f"{name:<26}{stage:<10}" + "".join(f"{values[p]:>10.2f}" for p in ("p20", "p50", "p80")))
    for name, values in row["ratios"].items():
        spread = ", ".join(f"{p} {value:.2f}" for p, value in values.items())
        lines.append(f"{name} / {OURS}, round by round: {spread}; {row['nfe_counted'][name]} NFE counted")
    lines += [f"{name} is absent: {reason}" for name, reason in row["absent"].items()]
    return "\n".join([*lines, roofline.table(row["roofline"], row["ceilings"])])


def written(args: argparse.Namespace, scratch: Path) -> list[Path]:
    """Engines that were named, and one of ONNX where the model can be exported as it is timed."""
    plain = args.quantise == "none" and not args.random_weights and args.dtype in ("auto", "float32")
    if "onnx" not in args.peers or not plain or args.device not in ("cpu", "auto") or torch.cuda.is_available():
        return args.engine
    from tdm_exporters.export import export
    from tdm_exporters.options import Options

    sizes = tuple(map(parse_size, args.size or ()))
    batch = (1, max(args.batch or (4,)))
    report = export(Options(args.model, "onnx", scratch / "onnx", sizes=sizes, batch=batch))
    return args.engine if report is None or report.failures else [*args.engine, scratch / "onnx"]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="an id or a folder (default: %(default)s)")
    parser.add_argument("--random-weights", action="store_true", help="of a published model, without a download")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--quantise", default="none", choices=("none", "fp8"), help="of ours; the peers stay as they are"
    )
    parser.add_argument("--size", action="append", metavar="WxH", help="(default: the model's own)")
    parser.add_argument("--batch", action="append", type=int, metavar="N", help="(default: 1, 2, 4)")
    parser.add_argument("--engine", action="append", type=Path, default=[], metavar="DIR", help="by tdm-serve export")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="ours compiled, too")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="latency", help="of the result file (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="append rows to benchmarks/results/latency.jsonl")
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, written(args, Path(scratch)))
        for row in bench.rows():
            print(table(row), flush=True)
            harness.publish(args.name, row, keep=args.keep)


if __name__ == "__main__":
    main()
