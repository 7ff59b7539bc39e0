"""Trains the second judge's detector on drawn scenes, whole and damaged, and measures how often the judge is right."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_finetune.judge.accuracy import measure
from tdm_finetune.judge.data import Batch, batch
from tdm_finetune.judge.net import Detector, Seen
from tdm_finetune.judge.sprites import KINDS, PAINTS, UNSURE
from tdm_finetune.judge.verdict import DETECTOR_FILE, Judge
from tdm_finetune.run import Run, cosine, seed_everything
from tdm_serve.config import at_least, positive
from tdm_serve.files import write_atomically

logger = logging.getLogger(__name__)
ACCURACY_FILE = "accuracy.json"


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """`tdm-serve finetune judge`."""

    run: Path = Path("runs/judge")
    seed: int = 0
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warmup: int = 50
    width: int = 72  # channels
    save_every: int = 200
    accuracy_prompts: int = 60  # per category, each with a true picture, a softened one and several wrong ones

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "warmup", "width", "save_every", "accuracy_prompts")
        at_least(self, 0, "weight_decay")
        positive(self, "learning_rate")


def loss_terms(seen: Seen, wanted: Batch) -> dict[str, Tensor]:
    """Presence per object, and kind, colour and place at the cells that know them."""
    known = ~torch.isnan(wanted.offset)
    return {
        "present": F.binary_cross_entropy_with_logits(seen.present, wanted.present, reduction="sum")
        / wanted.present.sum().clamp_min(1.0),
        "kind": F.cross_entropy(seen.kind, wanted.kind, ignore_index=UNSURE),
        "colour": F.cross_entropy(seen.colour, wanted.colour, ignore_index=UNSURE),
        "offset": F.smooth_l1_loss(seen.offset[known], wanted.offset[known], beta=0.1),
    }


def train(config: JudgeConfig) -> Path:
    """Trains, or resumes, and writes the detector and its accuracy into the run folder, which it returns."""
    seed_everything(config.seed)
    detector = Detector(KINDS, PAINTS, config.width)
    optimizer = torch.optim.AdamW(detector.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config.run, config, total_steps=config.steps)
    if (state := run.resume()) is not None:
        detector.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while run.step < config.steps:
        run.advance(_step(detector, optimizer, config, run.step))
        if run.step % config.save_every == 0:
            run.save(model=detector.state_dict(), optimizer=optimizer.state_dict())
    run.close()
    detector.eval().save(config.run / DETECTOR_FILE)
    # as it is used: from the file, rounded
    accuracy = measure(Judge.load(config.run), config.accuracy_prompts, config.seed)
    write_atomically(config.run / ACCURACY_FILE, (json.dumps(accuracy, indent=1) + "\n").encode())
    logger.info("accuracy: %s", accuracy)
    return config.run


def _step(detector: Detector, optimizer: torch.optim.Optimizer, config: JudgeConfig, step: int) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * cosine(step, config.steps, config.warmup, floor=0.0)
    examples = batch(config.batch, config.seed, step)
    terms = loss_terms(detector(examples.pictures), examples)
    sum(terms.values(), torch.zeros(())).backward()
    norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), 2.0)
    optimizer.step()
    optimizer.zero_grad()
    return {name: value.item() for name, value in terms.items()} | {"gradient_norm": float(norm)}
