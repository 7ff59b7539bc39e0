"""TDM: distils the multi-step teacher into a K-step generator by trajectory distribution matching.

The student's deterministic trajectory is cut at its K boundaries. At every boundary the student's samples, noised a
little further, must have the teacher's distribution at that noise level; the gradient of that reverse KL is the
difference between the teacher's score and a fake score, trained beside on the student's own samples. Guidance is
baked in as its own term, so the student needs one evaluation per step. One update, read top to bottom below:
roll out, train the fake score, train the generator. No pictures are needed, only prompts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_finetune import losses, scenes
from tdm_finetune.assemble import ADAPTER_FILE, VERSION_FILE
from tdm_finetune.cache import Frozen
from tdm_finetune.ema import Ema
from tdm_finetune.evaluate import quick_scores
from tdm_finetune.roles import Lora, VelocityNet, targets
from tdm_finetune.rollout import Trajectory, rollout
from tdm_finetune.run import STATE_FILE, Run, as_json, finished, seed_everything, trapezoid
from tdm_serve.config import at_least, multiple_of, positive
from tdm_serve.errors import ConfigError
from tdm_serve.files import write_atomically
from tdm_serve.machine import stamp
from tdm_serve.models.families.zimage import load_transformer
from tdm_serve.models.families.zimage_denoiser import TEXT_MULTIPLE, ZImageDenoiser
from tdm_serve.models.load import examine
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.sampling import plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TdmConfig:
    """`tdm-serve finetune tdm`."""

    run: Path = Path("runs/tdm")
    checkpoint: str = "default-teacher"  # id or folder of the multi-step teacher
    start: Path | None = None  # a finished run of the same teacher and rank whose roles this one goes on from
    seed: int = 0
    steps: int = 260
    decay_steps: int = 60  # the rates are constant, then fall linearly to zero over these last steps
    batch: int = 64
    nfe: int = 4
    guidance: float = 3.0  # of the teacher's score; 1 is off
    interval: Literal["separate", "shared"] = "shared"  # noise up to the step's own level, or up to pure noise
    target: Literal["anchored", "bridge"] = "anchored"  # of the fake score
    rank: int = 32
    alpha: float = 64.0
    generator_rate: float = 3e-4
    fake_rate: float = 1.2e-3
    fake_updates: int = 1  # per generator update
    warmup: int = 10
    clip: float = 1.0
    ema: float = 0.95
    text_tokens: int = 32
    save_every: int = 25
    score_every: int = 50

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "decay_steps", "batch", "nfe", "rank", "fake_updates", "warmup")
        at_least(self, 1, "save_every", "score_every")
        at_least(self, 0, "guidance", "ema")
        positive(self, "alpha", "generator_rate", "fake_rate", "clip")
        multiple_of(self, TEXT_MULTIPLE, "text_tokens")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Encoded prompts of one update: features (B, L, D) and token counts (B,)."""

    text: Tensor
    lengths: Tensor


class Distillation:
    """The roles, their optimisers and the random stream of one run."""

    def __init__(self, config: TdmConfig) -> None:
        spec, _ = examine(config.checkpoint)
        if spec.adapter is not None:
            raise ConfigError(
                f"checkpoint {config.checkpoint!r} is version {spec.version!r}, an adapter on a base; the base is what "
                "is distilled: default-teacher or FOLDER@teacher"
            )
        with quiet_bars():
            transformer = load_transformer(spec)
        self.config, self.shift = config, spec.shift
        self.frozen = Frozen.load(spec.base / "vae", spec.base)
        self.denoiser = ZImageDenoiser(transformer)
        self.net = VelocityNet(self.denoiser)
        self.random = torch.Generator().manual_seed(config.seed)
        where = targets(transformer, self.denoiser)
        self.generator = Lora(where, config.rank, config.alpha, self.random)
        self.fake = Lora(where, config.rank, config.alpha, self.random)
        self.generator_optimizer = _adam(self.generator.parameters, config.generator_rate)
        self.fake_optimizer = _adam(self.fake.parameters, config.fake_rate)
        if config.start is not None:
            self.load_roles(torch.load(finished(config.start / STATE_FILE, "tdm"), weights_only=True))
        self.ema = Ema({str(i): p for i, p in enumerate(self.generator.parameters)}, config.ema)
        self.rows = plan("euler", config.nfe, self.shift)
        self.levels = torch.tensor([*(row.sigma for row in self.rows), 0.0])  # (K + 1,)
        text, lengths = self.frozen.encode([""], config.text_tokens)
        self.empty = Prompts(text, lengths)

    def encode(self, prompts: Sequence[str]) -> Prompts:
        return Prompts(*self.frozen.encode(list(prompts), self.config.text_tokens))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    @torch.no_grad()
    def roll_out(self, prompts: Prompts) -> Trajectory:
        """K unguided steps of the live generator from fresh noise."""
        acting = self.net.acting_as(self.generator.weights())
        noise = self.randn(len(prompts.text), self.frozen.channels, 16, 16)
        return rollout(lambda x, sigma: acting(x, sigma, prompts.text, prompts.lengths), noise, self.rows)

    def draw_step(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """A step k (B,) for every picture, the level below it, and a level tau inside its interval."""
        k = torch.randint(self.config.nfe, (batch,), generator=self.random)
        below = self.levels[k + 1]
        above = self.levels[k] if self.config.interval == "separate" else torch.ones_like(below)
        return k, below, losses.draw_level(below, above, self.shift, self.random)

    def fake_loss(self, trajectory: Trajectory, prompts: Prompts) -> Tensor:
        """The fake score learns the student's own distribution at noised boundaries (TDM eq. 7)."""
        k, below, tau = self.draw_step(len(prompts.text))
        each = torch.arange(len(k))
        start, noise = trajectory.states[k + 1, each], self.randn(*trajectory.clean.shape[1:])
        noisy = losses.bridge(start, below, tau, noise)
        if self.config.target == "anchored":
            target = losses.anchored_target(noisy, tau, trajectory.clean[k, each])
        else:
            target = losses.bridge_target(start, below, tau, noise)
        predicted = self.net.acting_as(self.fake.weights())(noisy, tau, prompts.text, prompts.lengths)
        return (predicted - target).square().mean()

    def generator_loss(self, trajectory: Trajectory, prompts: Prompts) -> Tensor:
        """Reverse KL against the teacher at one noised boundary per picture; one differentiated network call."""
        k, below, tau = self.draw_step(len(prompts.text))
        state, sigma = trajectory.states[k, torch.arange(len(k))], self.levels[k]
        velocity = self.net.acting_as(self.generator.weights())(state, sigma, prompts.text, prompts.lengths)
        clean = losses.clean_of(state, sigma, velocity)
        following = state + losses.per_picture(below - sigma) * velocity
        noisy = losses.bridge(following.detach(), below, tau, self.randn(*state.shape))
        kl, guide, scale = self.direction(clean.detach(), noisy, tau, prompts)
        return losses.generator_loss(clean, kl + guide, scale)

    @torch.no_grad()
    def direction(self, clean: Tensor, noisy: Tensor, tau: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """KL and guidance directions at `noisy` from the teacher and the fake score (TDM eq. 8)."""
        text, lengths = self.empty.text.expand_as(prompts.text), self.empty.lengths.expand_as(prompts.lengths)
        base = self.net.acting_as({})
        teacher = losses.clean_of(noisy, tau, base(noisy, tau, prompts.text, prompts.lengths))
        away = losses.clean_of(noisy, tau, base(noisy, tau, text, lengths))
        fake_velocity = self.net.acting_as(self.fake.weights())(noisy, tau, prompts.text, prompts.lengths)
        fake = losses.clean_of(noisy, tau, fake_velocity)
        return losses.generator_direction(clean, teacher, away, fake, self.config.guidance)

    def update(self, prompts: Prompts, step: int) -> dict[str, float]:
        """Roll out, train the fake score, train the generator."""
        config = self.config
        scalars: dict[str, float] = {}
        with torch.autocast("cpu", torch.bfloat16):
            trajectory = self.roll_out(prompts)
            for _ in range(config.fake_updates):
                loss = self.fake_loss(trajectory, prompts)
                scalars |= self._apply(loss, "fake", self.fake, self.fake_optimizer, config.fake_rate, step)
            loss = self.generator_loss(trajectory, prompts)
            rate = config.generator_rate
            scalars |= self._apply(loss, "generator", self.generator, self.generator_optimizer, rate, step)
        self.ema.update(step)
        return scalars

    def _apply(
        self, loss: Tensor, name: str, role: Lora, optimizer: torch.optim.Optimizer, rate: float, step: int
    ) -> dict[str, float]:
        config = self.config
        optimizer.param_groups[0]["lr"] = rate * trapezoid(step, config.steps, config.warmup, config.decay_steps)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(role.parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return {f"{name}_loss": loss.item(), f"{name}_gradient_norm": float(norm)}

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.parameters,
            "fake": self.fake.parameters,
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "fake_optimizer": self.fake_optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "random": self.random.get_state(),
        }

    @torch.no_grad()
    def load_roles(self, state: dict[str, Any]) -> None:
        for role, saved in ((self.generator, state["generator"]), (self.fake, state["fake"])):
            for parameter, value in zip(role.parameters, saved, strict=True):
                parameter.copy_(value)

    def load(self, state: dict[str, Any]) -> None:
        self.load_roles(state)
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.fake_optimizer.load_state_dict(state["fake_optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.random.set_state(state["random"])

    def score(self, sheet: Path) -> dict[str, float]:
        """Quick validation scores of the averaged generator at its own step count."""
        with self.ema.applied(), torch.no_grad():
            weights = self.generator.weights()
            kept = {name: self.denoiser.get_parameter(name).data.clone() for name in weights}
            self._put(weights)
            try:
                return quick_scores(self.denoiser, self.frozen, self.rows, guidance=1.0, sheet=sheet)
            finally:
                self._put(kept)

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self.denoiser.get_parameter(name).data.copy_(value)


def _adam(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """beta1 = 0: both roles chase a moving target (TDM and TDM-R1's settings)."""
    return torch.optim.AdamW(parameters, rate, betas=(0.0, 0.999), weight_decay=0.0)


def batches(config: TdmConfig, skip: int) -> Iterator[list[str]]:
    """Training prompts, starting `skip` batches into the stream."""
    stream = (prompt.text for prompt in scenes.prompts("train", seed=config.seed + 1))
    next(islice(stream, skip * config.batch, skip * config.batch), None)
    while True:
        yield list(islice(stream, config.batch))


def train(config: TdmConfig) -> Path:
    """Distils, or resumes, and writes the averaged generator as a LoRA with its sigma table; returns the run folder."""
    seed_everything(config.seed)
    distillation = Distillation(config)
    run = Run(config.run, config, total_steps=config.steps, every=10)
    if (state := run.resume()) is not None:
        distillation.load(state)
    for prompts in islice(batches(config, run.step), config.steps - run.step):
        run.advance(distillation.update(distillation.encode(prompts), run.step))
        if run.step % config.save_every == 0 or run.step == config.steps:
            run.save(**distillation.state())
        if run.step % config.score_every == 0 or run.step == config.steps:
            scores = distillation.score(run.folder / "sheet.png")
            run.log({f"val_{name}": value for name, value in scores.items()})
            logger.info("step %d: %s", run.step, scores)
    run.close()
    return save(distillation, config)


def save(distillation: Distillation, config: TdmConfig) -> Path:
    """The adapter, and beside it what a checkpoint's manifest says of this version."""
    with distillation.ema.applied():
        distillation.generator.save(config.run / ADAPTER_FILE)
    version = {
        "description": f"Distilled to {config.nfe} network evaluations with TDM.",
        "sampler": "euler",
        "shift": distillation.shift,
        "sigmas": [row.sigma for row in distillation.rows],
        "guidance": 1.0,
        "lineage": {
            "method": "tdm",
            "config": as_json(config),
            "machine": stamp(),
        },
    }
    write_atomically(config.run / VERSION_FILE, (json.dumps(version, indent=1) + "\n").encode())
    return config.run
