"""Trains toys in a process of its own, or in several under torchrun: `python toy_driver.py PLAN.json`.

A plan is a list of runs: {"method": "tdm" or "tdm-r1", "world": "toy" or "zimage", "config": {...}, "record": path}.
Every update's scalars are added to the record, floats as hex digits, and an error's sentence in the end. With
"kill_at" the process kills itself as `kill -9` does after so many updates.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_zimage import TinyZImage
from torch import nn
from torch.distributed.tensor import DTensor
from toy_trainee import r1_config, student, tdm_config

from tdm_finetune.clock import PREFIX
from tdm_finetune.fit import fit
from tdm_finetune.run import Run
from tdm_finetune.tdm import Distillation
from tdm_finetune.tdm_r1 import Reinforcement
from tdm_finetune.workers import Workers
from tdm_serve.errors import TdmServeError


def remembering(record: Path, kill_at: int | None = None) -> Any:
    """`Run.advance` with a record."""
    advance = Run.advance

    def remember(self: Run, scalars: Mapping[str, float]) -> None:
        advance(self, scalars)
        if self.leads:
            row = {name: value.hex() for name, value in scalars.items() if not name.startswith(PREFIX)}
            with record.open("a") as file:
                file.write(json.dumps({"step": self.step, **row}) + "\n")
        if self.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return remember


def recorded(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def share_held(blocks: Sequence[nn.Module]) -> float:
    """Of the blocks' weights, in this process. What is around the blocks stays whole after its first use."""
    weights = {id(p): p for block in blocks for p in block.parameters()}.values()
    held = [p.to_local() if isinstance(p, DTensor) else p for p in weights]
    return sum(p.numel() for p in held) / sum(p.numel() for p in weights)


def train(task: Mapping[str, Any]) -> None:
    settings: dict[str, Any] = dict(task["config"])
    run = Path(settings.pop("run"))
    trainee: Any = TinyZImage() if task.get("world") == "zimage" else None
    if task["method"] == "tdm":
        config = tdm_config(run, **settings)
        trainer = Distillation(config, student(config, trainee))
        fit(trainer, config, "tdm")
    else:
        config = r1_config(run, **settings)
        trainer = Reinforcement(config, student(config, trainee), config.rewards())
        fit(trainer, config, "tdm-r1")
    if trainer.student.workers.leads:
        (run / "held.txt").write_text(str(share_held(trainer.student.trainee.blocks())))


def main(plan: Path) -> None:
    advance = Run.advance
    for task in json.loads(plan.read_text()):
        record = Path(task["record"])
        Run.advance = remembering(record, task.get("kill_at"))
        try:
            train(task)
        except TdmServeError as error:
            if Workers().leads:
                record.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        finally:
            Run.advance = advance


if __name__ == "__main__":
    main(Path(sys.argv[1]))
