"""What TDM and TDM-R1 share: a generator with its fake score on a frozen teacher, and their terms of the loss.

The student's deterministic trajectory is cut at its K boundaries. At every boundary the student's samples, noised a
little further, must have the teacher's distribution at that noise level. The gradient of that reverse KL is the
difference between the teacher's score and the fake score, which learns the student's own samples beside it. Only the
one network call that predicts x0 from a stored boundary is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_finetune import losses
from tdm_finetune.draws import Draws, stream
from tdm_finetune.ema import Ema
from tdm_finetune.process import bridge, noise_of
from tdm_finetune.prompts import stream as prompt_stream
from tdm_finetune.roles import Role, Roles
from tdm_finetune.rollout import Trajectory, advance, rollout
from tdm_finetune.run import STATE_FILE, finished
from tdm_finetune.trainee import Conditioning, Prompt, Trainee
from tdm_finetune.workers import Precision, Workers, autocast
from tdm_serve.config import at_least, between, multiple_of, positive
from tdm_serve.errors import ConfigError
from tdm_serve.models.families.zimage_denoiser import TEXT_MULTIPLE


@dataclass(frozen=True, slots=True)
class StudentConfig:
    """The options that TDM and TDM-R1 share."""

    run: Path = Path("runs/tdm")
    checkpoint: str = "default-teacher"  # id or folder; a version with an adapter is where the generator starts
    start: Path | None = None  # a finished distillation run of the same base and rank whose roles this one goes on from
    prompts: Path | None = None  # .txt or .jsonl; otherwise the prompts of the checkpoint's own world
    categories: tuple[str, ...] = ()  # only these, by the prompts' key "category"
    seed: int = 0
    steps: int = 300
    decay_steps: int = 60  # the rates are constant, then fall linearly to zero over these last steps
    warmup: int = 10
    nfe: int = 4
    guidance: float = 3.0  # of the teacher's score; 1 is off
    interval: Literal["shared", "separate"] = "shared"  # noise up to pure noise, or up to the step's own level
    target: Literal["anchored", "bridge"] = "anchored"  # of the fake score
    importance: bool = False  # weigh the anchored target by TDM's density ratio
    metric: Literal["squared", "huber"] = "squared"  # of the generator's terms
    rank: int = 32  # of the LoRAs; 0 trains full weights
    alpha: float = 64.0
    generator_rate: float = 3e-4
    fake_rate: float = 1.2e-3
    fake_updates: int = 1  # per generator update
    fake_anchor: float = 0.0  # weight of the fake score's squared distance from the base
    clip: float = 1.0  # of each role's gradient norm
    weight_decay: float = 0.0
    ema: float = 0.95  # of the generator that is scored and saved
    micro_batch: int = 0  # pictures a backward pass, whole groups; 0 is all at once
    precision: Precision = "bf16"
    compile: bool = False
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    shard: bool = False  # spread the frozen base over the processes
    size: int = 0  # side of the square pictures in pixels; 0 is the checkpoint's own
    shift: float = 0.0  # of flow matching; 0 is the checkpoint's own
    top: int = 0  # noising step at which a student of SD1.5 or PixArt starts; 0 is the checkpoint's own
    targets: tuple[str, ...] = ()  # modules that get LoRAs; otherwise those of the adapter, or usual for the family
    truncate_prompts: bool = False  # cut prompts that are too long for the checkpoint, instead of refusing the file
    text_tokens: int = 32  # of Z-Image's texts; other families read texts of one length
    save_every: int = 25
    score_every: int = 50
    score_prompts: int = 70  # validation prompts, two pictures each
    patience: int = 0  # stop after so many scores without a better one and keep the best generator; 0 never stops
    watch: str = ""  # rewards that are logged on those pictures and never trained on, such as "clip"

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "decay_steps", "warmup", "nfe", "save_every", "score_every", "score_prompts")
        at_least(self, 0, "patience", "seed", "guidance", "rank", "micro_batch", "fake_anchor", "fake_updates")
        at_least(self, 0, "size", "shift", "top")
        between(self, 0, 1, "ema")
        at_least(self, 0, "generator_rate", "fake_rate", "weight_decay")
        positive(self, "alpha", "clip")
        multiple_of(self, TEXT_MULTIPLE, "text_tokens")
        if self.compile and self.checkpointing:
            raise ValueError("compile and checkpointing are both on; what is recomputed cannot be compiled: use one")
        if self.nfe > 8:
            raise ValueError(f"nfe is {self.nfe}; a few-step student has between 1 and 8 evaluations")
        if self.shard and not self.rank:
            raise ValueError("shard spreads a frozen base, but rank is 0, which trains full weights; give a rank")


@dataclass(frozen=True, slots=True)
class Batch:
    """Groups of `group` pictures of one prompt each, whole groups in a row, with their random numbers."""

    prompts: list[Prompt]  # one a picture
    conditioning: Conditioning
    empty: Conditioning
    draws: Draws
    group: int

    def __len__(self) -> int:
        return len(self.prompts)

    def parts(self, pictures: int) -> Iterator[tuple[slice, Batch]]:
        """Slices of at most `pictures` (at least one group); all of it where `pictures` is 0."""
        groups = max(1, (pictures or len(self)) // self.group)
        for first in range(0, len(self) // self.group, groups):
            chosen = slice(first * self.group, (first + groups) * self.group)
            draws = self.draws.part(slice(first, first + groups))
            conditioning, empty = (tuple(t[chosen] for t in c) for c in (self.conditioning, self.empty))
            yield chosen, Batch(self.prompts[chosen], conditioning, empty, draws, self.group)


@dataclass(frozen=True, slots=True)
class Step:
    """One differentiated step of the generator at a random boundary of each picture."""

    k: Tensor  # (B,) which boundary
    clean: Tensor  # (B, C, H, W) predicted, with gradient
    following: Tensor  # (B, C, H, W) the boundary below, detached
    low: Tensor  # (B,) its level


class Student:
    """Generator, fake score and teacher of one trainee."""

    def __init__(self, config: StudentConfig, trainee: Trainee, workers: Workers) -> None:
        self.config, self.trainee, self.workers = config, trainee, workers
        self.process = trainee.process
        self.device = workers.device
        trainee.net.to(self.device)
        self.roles = Roles(trainee, config.rank, config.alpha, compiled=config.compile)
        if config.checkpointing:
            self.roles.recompute(trainee.blocks())
        self.generator = self.roles.new(stream(config.seed, 1), trainee.adapter)
        self.fake = self.roles.new(stream(config.seed, 2))
        if config.start is not None:
            self._go_on_from(config.start)
        self.levels = torch.tensor(self.process.levels(config.nfe), device=self.device)  # (K + 1,)
        self.top = self.levels[0]
        self.average = Ema({str(i): p for i, p in enumerate(self.generator.parameters)}, config.ema)

    def _go_on_from(self, run: Path) -> None:
        """The averaged generator and the fake score of another run's state."""
        state = torch.load(finished(run / STATE_FILE, "tdm"), weights_only=True)
        take_over(self.generator.parameters, list(state["average"].values()), run)
        take_over(self.fake.parameters, state["fake"], run)

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        """The config's prompts, without end."""
        return prompt_stream(self.trainee, self.config.prompts, self.config.categories, split, seed)

    def batch(self, prompts: Sequence[Prompt], group: int, update: int, groups: Sequence[int]) -> Batch:
        """Each prompt `group` times; `groups` are the prompts' places in the whole update, over all processes."""
        each = torch.arange(len(prompts)).repeat_interleave(group)
        encoded = self.trainee.encode([prompt.text for prompt in prompts])
        conditioning = tuple(tensor[each].to(self.device) for tensor in encoded)
        empty = tuple(t.to(self.device).expand(len(each), *t.shape[1:]) for t in self.trainee.encode([""]))
        repeated = [prompt for prompt in prompts for _ in range(group)]
        draws = Draws.of(self.config.seed, update, groups, group, self.device)
        return Batch(repeated, conditioning, empty, draws, group)

    def autocast(self) -> Any:
        return autocast(self.device, self.config.precision)

    def roll_out(self, batch: Batch, eta: float = 0.0) -> Trajectory:
        """K unguided steps of the live generator from fresh noise, in parts of the micro-batch's size."""
        found: list[Trajectory] = []
        for _, part in batch.parts(self.config.micro_batch):
            noise = part.draws.normal(*self.trainee.latent_shape)
            fresh = None
            if eta > 0:
                fresh = torch.stack([part.draws.normal(*self.trainee.latent_shape) for _ in range(self.config.nfe)])
            with self.autocast():
                found.append(self.trajectory(self.generator, noise, part.conditioning, eta, fresh))
        return joined(found)

    def trajectory(
        self, role: Role, noise: Tensor, conditioning: Conditioning, eta: float = 0.0, fresh: Tensor | None = None
    ) -> Trajectory:
        return rollout(lambda x, level: role(x, level, conditioning), self.process, noise, self.config.nfe, eta, fresh)

    def level_above(self, k: Tensor, low: Tensor, u: Tensor) -> Tensor:
        """A level (B,) over boundary `low`: inside the step k's own interval, or anywhere up to pure noise."""
        above = self.levels[k] if self.config.interval == "separate" else self.top.expand_as(low)
        return self.process.draw(low, above, u)

    def fake_terms(self, batch: Batch, trajectory: Trajectory) -> dict[str, Tensor]:
        """The fake score learns the student's own distribution at noised boundaries (TDM eq. 7)."""
        config = self.config
        k = batch.draws.below(config.nfe)
        each, low = torch.arange(len(k), device=self.device), self.levels[k + 1]
        start, clean = trajectory.states[k + 1, each], trajectory.clean[k, each]
        tau = self.level_above(k, low, batch.draws.uniform())
        noise = batch.draws.normal(*self.trainee.latent_shape)
        noisy = bridge(self.process, start, low, tau, noise)
        weight = torch.ones_like(tau)
        if config.target == "bridge":
            target = self.process.score_target(start, low, tau, noise)
        else:
            target = self.process.target(noisy, tau, clean)
            if config.importance:
                weight = losses.importance_weight(noise_of(self.process, noisy, tau, clean), noise)
        predicted = self.fake(noisy, tau, batch.conditioning)
        terms = {"loss": weight * losses.squared_error(predicted, target)}
        if config.fake_anchor > 0:
            with torch.no_grad():
                base = self.roles.base(noisy, tau, batch.conditioning)
            terms["anchor"] = config.fake_anchor * losses.squared_error(predicted, base)
        return terms

    def step(self, batch: Batch, trajectory: Trajectory, eta: float = 0.0) -> Step:
        """Predicts x0 from a random stored boundary of each picture, with gradient."""
        k = batch.draws.below(self.config.nfe)
        each, level, low = torch.arange(len(k), device=self.device), self.levels[k], self.levels[k + 1]
        state = trajectory.states[k, each]
        clean = self.process.clean(state, level, self.generator(state, level, batch.conditioning))
        fresh = None if trajectory.fresh is None else trajectory.fresh[k, each]
        following = advance(self.process, state, level, low, clean.detach(), eta, fresh)
        return Step(k, clean, following, low)

    def matching(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """(B,) each: the reverse KL's pull and the guidance's, at one random level per picture (TDM eq. 8)."""
        config, process = self.config, self.process
        tau = self.level_above(step.k, step.low, batch.draws.uniform())
        noise = batch.draws.normal(*self.trainee.latent_shape)
        noisy = bridge(process, step.following, step.low, tau, noise)
        with torch.no_grad():
            teacher = process.clean(noisy, tau, self.roles.base(noisy, tau, batch.conditioning))
            away = process.clean(noisy, tau, self.roles.base(noisy, tau, batch.empty))
            fake = process.clean(noisy, tau, self.fake(noisy, tau, batch.conditioning))
        guidance = losses.guidance_direction(teacher, away, config.guidance)
        scale = losses.scale_of(step.clean, teacher + guidance)
        kl = losses.pull(step.clean, losses.kl_direction(teacher, fake), scale, config.metric)
        return kl, losses.pull(step.clean, guidance, scale, config.metric)

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.parameters,
            "fake": self.fake.parameters,
            "average": self.average.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        load_tensors(self.generator.parameters, state["generator"])
        load_tensors(self.fake.parameters, state["fake"])
        self.average.load_state_dict(state["average"])


@torch.no_grad()
def load_tensors(into: list[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def take_over(into: list[Tensor], values: Sequence[Tensor], run: Path) -> None:
    """Another run's tensors. Raises ConfigError where they have other shapes."""
    shapes, theirs = ([tuple(tensor.shape) for tensor in tensors] for tensors in (into, values))
    if shapes != theirs:
        raise ConfigError(
            f"{run} trained {len(theirs)} tensors and this run has {len(shapes)}, or of other shapes; it can go on "
            "from a run of the same base, rank and targets"
        )
    load_tensors(into, values)


def joined(parts: list[Trajectory]) -> Trajectory:
    """One trajectory of several micro-batches'."""
    if len(parts) == 1:
        return parts[0]
    fresh = [part.fresh for part in parts if part.fresh is not None]
    return Trajectory(
        torch.cat([part.states for part in parts], 1),
        torch.cat([part.clean for part in parts], 1),
        torch.cat(fresh, 1) if fresh else None,
    )
