"""Trains the micro world's multi-step teacher on freshly rendered scenes, with condition dropout and noisy captions.

Flow matching regresses v = noise - clean, the epsilon process the noise (method notes 1.1). Captions are wrong on
purpose, each count, colour and relation with its own probability, so that the teacher draws clean squares but follows
prompts only so well: that leaves the headroom in which reinforcement is measured. Every step's scenes and noise are a
function of (seed, step), so there is no data position to save.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_finetune.draws import stream
from tdm_finetune.ema import Ema
from tdm_finetune.micro import world
from tdm_finetune.micro.trainee import NOISING_STEPS, MicroSettings, MicroTrainee, encode_pictures
from tdm_finetune.paint import score_network
from tdm_finetune.process import per_picture
from tdm_finetune.run import Run, cosine, seed_everything
from tdm_serve.config import at_least, positive

logger = logging.getLogger(__name__)

SETTINGS = ("process", "shift", "top", "width", "layers", "heads", "guidance")  # what the folder keeps of the config


@dataclass(frozen=True, slots=True)
class MicroConfig:
    """`tdm-serve finetune micro`."""

    run: Path = Path("runs/micro-teacher")
    process: Literal["flow", "epsilon"] = "flow"
    shift: float = 1.0
    top: int = 900
    width: int = 128
    layers: int = 4
    heads: int = 4
    guidance: float = 2.5  # stored with the model, for its own sampler and for scoring
    seed: int = 0
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 200
    ema: float = 0.999
    dropout: float = 0.1
    count_noise: float = 0.3  # probability that a caption's count is drawn afresh
    colour_noise: float = 0.2  # the same for each colour
    relation_noise: float = 0.3
    save_every: int = 250
    score_every: int = 1000
    score_prompts: int = 192

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "warmup", "save_every", "score_every", "score_prompts")
        at_least(self, 0, "ema", "dropout", "count_noise", "colour_noise", "relation_noise")
        positive(self, "learning_rate")
        for name in ("ema", "dropout", "count_noise", "colour_noise", "relation_noise"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most 1")
        self.settings()

    def settings(self) -> MicroSettings:
        return MicroSettings(**{name: getattr(self, name) for name in SETTINGS})


def caption(spec: world.Spec, rng: random.Random, config: MicroConfig) -> str:
    """What training says about a picture of `spec`: now and then nothing, often something slightly wrong.

    Never a held-out combination, which would be learned from a picture that shows another one.
    """
    if rng.random() < config.dropout:
        return ""
    while True:
        said = _misheard(spec, rng, config)
        if not world.is_held_out(said):
            return world.phrase(said)


def _misheard(spec: world.Spec, rng: random.Random, config: MicroConfig) -> world.Spec:
    """`spec` with every slot drawn afresh at its probability; two colours stay different."""
    colours = list(spec.colours)
    for index in range(len(colours)):
        if rng.random() < config.colour_noise:
            others = colours[:index] + colours[index + 1 :]
            colours[index] = rng.choice([colour for colour in world.COLOURS if colour not in others])
    said = replace(spec, colours=tuple(colours))
    if spec.category == "counting" and rng.random() < config.count_noise:
        said = replace(said, count=rng.randint(1, world.MAX_COUNT))
    if spec.relation is not None and rng.random() < config.relation_noise:
        said = replace(said, relation=rng.choice(world.RELATIONS))
    return said


class Teacher:
    """Model, optimiser and average of one training run."""

    def __init__(self, config: MicroConfig) -> None:
        self.config = config
        net = config.settings().build()
        self.trainee = MicroTrainee(config.settings(), net)
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = Ema(dict(net.named_parameters()), config.ema)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns loss and gradient norm."""
        clean, captions = self.batch(step)
        generator = stream(self.config.seed, step)
        noise = torch.randn(clean.shape, generator=generator)
        level = self.levels(len(clean), generator)
        process = self.trainee.process
        noisy = per_picture(process.signal(level)) * clean + per_picture(process.spread(level)) * noise
        target = noise - clean if self.config.process == "flow" else noise
        predicted: Tensor = self.net(noisy, level, *self.trainee.encode(captions))
        loss = (predicted - target).square().mean()
        return {"loss": loss.item(), "gradient_norm": self._update(loss, step)}

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """True pictures as clean latents, categories in turn, and what is said about them."""
        rng = random.Random(f"micro/{self.config.seed}/{step}")
        turns = len(world.CATEGORIES)
        specs = [world.draw(world.CATEGORIES[i % turns], "train", rng) for i in range(self.config.batch)]
        return encode_pictures(world.render(specs, rng)), [caption(spec, rng, self.config) for spec in specs]

    def levels(self, batch: int, generator: torch.Generator) -> Tensor:
        """Noise levels (B,): logit-normal under the shift for flow matching, else uniform over all noising steps."""
        if self.config.process == "epsilon":
            return torch.randint(1, NOISING_STEPS + 1, (batch,), generator=generator).float()
        u = torch.randn(batch, generator=generator).sigmoid()
        return self.config.shift * u / (1 + (self.config.shift - 1) * u)

    def _update(self, loss: Tensor, step: int) -> float:
        config = self.config
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        rate = config.learning_rate * cosine(step, config.steps, config.warmup)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)
        return float(norm)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(config: MicroConfig) -> Path:
    """Trains, or resumes, and writes the averaged model into the run folder, which `MicroTrainee.load` then reads."""
    seed_everything(config.seed)
    run = Run(config.run, config, total_steps=config.steps)
    teacher = Teacher(config)
    if (state := run.resume()) is not None:
        teacher.load(state)
    while run.step < config.steps:
        run.advance(teacher.step(run.step))
        if run.step % config.save_every == 0:
            run.save(**teacher.state())
        if run.step % config.score_every == 0 or run.step == config.steps:
            log_scores(teacher, run)
    run.close()
    with teacher.ema.applied():
        teacher.trainee.save(config.run)
    return config.run


def log_scores(teacher: Teacher, run: Run) -> None:
    """The averaged teacher's scores on validation prompts at 24 guided steps."""
    config, net = teacher.config, teacher.net
    with teacher.ema.applied():
        found = score_network(
            teacher.trainee,
            lambda latents, level, conditioning: net(latents, level, *conditioning),
            split="val",
            n=config.score_prompts,
            nfe=24,
            guidance=config.guidance,
        )
    kept = {name: found[name] for name in ("strict", "soft", "palette_error", "diversity", "categories")}
    run.log({f"val_{name}": value for name, value in kept.items()})
    logger.info("step %d: %s", run.step, kept)
