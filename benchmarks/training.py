"""Where a training update's time goes: images per second of each phase of TDM and TDM-R1, and the memory it took.

The first updates of a run are measured as they are and thrown away; nothing is written but the result row.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads

from tdm_finetune.clock import PREFIX
from tdm_finetune.fit import Trainer, make_student, memory_mb, updates
from tdm_finetune.student import StudentConfig
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config

WARMUP = 2


def trainer_of(method: str, model: str, pictures: int, group: int, run: Path) -> tuple[Trainer, StudentConfig]:
    """A trainer of `pictures` an update on the teacher of `model`."""
    if method == "tdm":
        config = TdmConfig(run=run, checkpoint=model, batch=pictures)
        return Distillation(config, make_student(config)), config
    config = TdmR1Config(run=run, checkpoint=model, groups=pictures // group, group=group, fake_warmup=0)
    return Reinforcement(config, make_student(config), config.rewards()), config


def measure(method: str, model: str, pictures: int, group: int, repeats: int) -> dict[str, Any]:
    """Seconds of each phase over `repeats` updates, as percentiles, images per second and shares."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, config = trainer_of(method, model, pictures, group, Path(folder))
        rounds: list[dict[str, float]] = []
        places = trainer.student.workers.share(trainer.groups)
        for step, prompts in enumerate(islice(updates(trainer, config, 0), WARMUP + repeats)):
            scalars = trainer.update(prompts, places, step)
            phases = {name.removeprefix(PREFIX): v for name, v in scalars.items() if name.startswith(PREFIX)}
            if step >= WARMUP:
                rounds.append(phases | {"update": sum(phases.values())})
        trainer.close()
    seconds = harness.summarise(rounds)
    whole = seconds["update"]["p50"]
    return {
        "method": method,
        "model": model,
        "pictures": pictures,
        "precision": config.precision,
        "seconds": seconds,
        "images_per_second": {name: round(pictures / v["p50"], 2) for name, v in seconds.items() if v["p50"] > 0},
        "share": {name: round(v["p50"] / whole, 3) for name, v in seconds.items() if name != "update"},
        "memory_mb": round(memory_mb()),
    }


def table(row: dict[str, Any]) -> str:
    """Phase by seconds, images per second and share."""
    lines = [f"{row['method']} on {row['model']}, {row['pictures']} pictures an update, {row['memory_mb']} MB"]
    lines.append(f"{'phase':<12}{'p50 s':>8}{'images/s':>10}{'share':>8}")
    for name, seconds in row["seconds"].items():
        rate, share = row["images_per_second"].get(name), row["share"].get(name, 1.0)
        lines.append(f"{name:<12}{seconds['p50']:>8.3f}{rate or 0:>10.1f}{share:>8.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("tdm", "tdm-r1"), default="tdm-r1")
    parser.add_argument("--model", default="default-teacher", help="id or folder of the base")
    parser.add_argument("--pictures", type=int, default=64, help="pictures an update")
    parser.add_argument("--group", type=int, default=16, help="pictures a prompt, for TDM-R1")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/training.jsonl")
    args = parser.parse_args()
    row = measure(args.method, args.model, args.pictures, args.group, args.repeats)
    print(table(row))
    harness.publish("training", row, keep=args.keep)


if __name__ == "__main__":
    main()
