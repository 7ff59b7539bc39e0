"""Where a training update's time goes: images per second of each phase of TDM and TDM-R1, and the memory it took.

The first updates of a run are measured as they are and thrown away; nothing is written but the result row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import torch
from random_trainee import SIZES, random_trainee

from tdm_finetune.clock import PREFIX
from tdm_finetune.cost import counted, memory_mb
from tdm_finetune.fit import Trainer, make_student, updates
from tdm_finetune.student import Student, StudentConfig
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config
from tdm_finetune.workers import Workers
from tdm_serve.errors import TdmServeError

WARMUP = 2
RANDOM_REWARD = "jpeg"  # cheap, and defined for noise


def configured(args: argparse.Namespace, run: Path) -> TdmConfig | TdmR1Config:
    """An update of so many pictures; at full size as the official runs bound their memory."""
    values: dict[str, Any] = {"run": run, "checkpoint": args.size or args.model, "micro_batch": args.micro_batch}
    if args.size:
        values |= {"checkpointing": True}
    if args.method == "tdm":
        return TdmConfig(**values, batch=args.pictures)
    reward = RANDOM_REWARD if args.size else None
    groups = args.pictures // args.group
    return TdmR1Config(**values, groups=groups, group=args.group, fake_warmup=0, reward=reward)


@contextmanager
def opened(config: TdmConfig | TdmR1Config, args: argparse.Namespace) -> Generator[Student]:
    """The student of a checkpoint, or of random weights."""
    if not args.size:
        yield make_student(config)
        return
    workers = Workers()
    with random_trainee(args.size, args.side, workers.device) as trainee:
        yield Student(config, trainee, workers)


def trainer_of(config: TdmConfig | TdmR1Config, student: Student) -> Trainer:
    if isinstance(config, TdmR1Config):
        return Reinforcement(config, student, config.rewards())
    return Distillation(config, student)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each phase over the updates, as percentiles, images per second and shares; NFE and memory."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(args, Path(folder))
        with opened(config, args) as student:
            trainer = trainer_of(config, student)
            try:
                rounds, nfe = timed(trainer, config, args.repeats)
            finally:
                trainer.close()
            trainee = student.trainee
            base = sum(p.numel() for p in trainee.net.parameters())
            trained = sum(p.numel() for p in student.generator.parameters)
    seconds = harness.summarise(rounds)
    whole = seconds["update"]["p50"]
    return {
        "method": args.method,
        "model": args.size or args.model,
        "pictures": args.pictures,
        "size": "{}x{}".format(*trainee.picture_size),
        "precision": config.precision,
        "parameters": base,
        "trained": trained,
        "nfe": nfe,
        "seconds": seconds,
        "images_per_second": {name: round(args.pictures / v["p50"], 2) for name, v in seconds.items() if v["p50"] > 0},
        "share": {name: round(v["p50"] / whole, 3) for name, v in seconds.items() if name != "update"},
        "memory_mb": round(memory_mb()),
    }


def timed(trainer: Trainer, config: StudentConfig, repeats: int) -> tuple[list[dict[str, float]], int]:
    """Seconds by phase of each update after the warm-up, and an update's network evaluations."""
    rounds: list[dict[str, float]] = []
    places = trainer.student.workers.share(trainer.groups)
    with counted(trainer.student.trainee.net) as calls:
        for step, prompts in enumerate(islice(updates(trainer, config, 0), WARMUP + repeats)):
            scalars = trainer.update(prompts, places, step)
            phases = {name.removeprefix(PREFIX): v for name, v in scalars.items() if name.startswith(PREFIX)}
            if step >= WARMUP:
                rounds.append(phases | {"update": sum(phases.values())})
    return rounds, calls() // (WARMUP + repeats)


def table(row: dict[str, Any]) -> str:
    """Phase by seconds, images per second and share."""
    told = f"{row['pictures']} pictures of {row['size']} an update, {row['nfe']} NFE, {row['memory_mb']} MB"
    lines = [f"{row['method']} on {row['model']}, {told}"]
    lines.append(f"{'phase':<12}{'p50 s':>8}{'images/s':>10}{'share':>8}")
    for name, seconds in row["seconds"].items():
        rate, share = row["images_per_second"].get(name), row["share"].get(name, 1.0)
        lines.append(f"{name:<12}{seconds['p50']:>8.3f}{rate or 0:>10.1f}{share:>8.1%}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("tdm", "tdm-r1"), default="tdm-r1")
    parser.add_argument("--model", default="default-teacher", help="id or folder of the base")
    parser.add_argument("--size", help=f"random weights instead: {', '.join(SIZES)}; with :tiny behind it for a test")
    parser.add_argument("--side", type=int, default=512, help="pixels of a full-size picture (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=64, help="pictures an update")
    parser.add_argument("--group", type=int, default=16, help="pictures a prompt, for TDM-R1")
    parser.add_argument("--micro-batch", type=int, default=0, help="pictures a backward pass, whole groups; 0 is all")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/training.jsonl")
    args = parser.parse_args()
    try:
        row = measure(args)
    except TdmServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: {args.pictures} pictures do not fit, give a smaller --micro-batch: {error}", file=sys.stderr)
        return 1
    print(table(row))
    harness.publish("training", row, keep=args.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
