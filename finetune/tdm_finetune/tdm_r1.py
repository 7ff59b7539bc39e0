"""TDM-R1: reinforces a few-step generator with rewards that have no gradient (arXiv 2603.07700).

The generator's trajectory is deterministic, so the reward of its last state is the exact reward of every boundary of
that trajectory (eq. 6). A surrogate reward, parameterised as a diffusion model beside the frozen reference, learns from
groups of pictures of one prompt to denoise the boundaries of better pictures better than the reference does, and those
of worse ones worse (eqs. 7-9). Its gradient is a difference of scores, which joins the reverse KL of TDM in the
generator's loss (eqs. 10-11). No denoising loss ever touches the generator: that is what blurs few-step models.

One update, read top to bottom in `Reinforcement.update`: rollout, reward, fake score, surrogate, generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tdm_finetune import losses
from tdm_finetune.clock import Clock
from tdm_finetune.cost import estimate
from tdm_finetune.draws import stream
from tdm_finetune.fit import fit, make_student
from tdm_finetune.learner import Learner
from tdm_finetune.replay import Replay
from tdm_finetune.rewards import RewardPool
from tdm_finetune.rollout import Trajectory
from tdm_finetune.run import STATE_FILE, finished, trapezoid
from tdm_finetune.student import Batch, Student, take_over
from tdm_finetune.surrogate import Surrogate, SurrogateConfig
from tdm_finetune.trainee import Prompt
from tdm_serve.config import at_least, between, positive
from tdm_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TdmR1Config(SurrogateConfig):
    """`tdm-serve finetune tdm-r1`."""

    run: Path = Path("runs/tdm-r1")
    checkpoint: str = "default-tdm"
    reward: str | None = None  # names with weights: "scenes:1.0,jpeg:0.2"; none: scenes or, with feedback, nothing else
    reward_workers: int = 1
    reward_timeout_s: float = 120.0
    feedback: Path | None = None  # people's ratings (JSON lines): the surrogate learns from them instead of the reward
    groups: int = 12  # prompts an update
    group: int = 16  # pictures a prompt
    advantage: Literal["value", "binary"] = "value"  # binary keeps only the side of the mean, as likes do
    advantage_scale: Literal["batch", "prompt"] = "batch"  # whose standard deviation divides the reward
    kl_weight: float = 1.0
    tdm_weight: float = 0.3  # lambda of the guidance term; the reward term gets the rest of 1
    trunc_steps: int = 4  # steps from the noisy end that get the reward term; the others are TDM, times lambda
    reward_steps: Literal["all", "last"] = "all"  # boundaries that carry the preference and the reward term
    preference: Literal["surrogate", "generator"] = "surrogate"  # generator: direct preference, the ablation that blurs
    eta: float = 0.0  # 0 is the deterministic rollout, 1 re-noises at every step
    fake_warmup: int = 20  # first updates that train only the fake score, when it starts afresh

    def __post_init__(self) -> None:
        SurrogateConfig.__post_init__(self)
        at_least(self, 1, "groups", "reward_workers", "trunc_steps")
        at_least(self, 2, "group")
        at_least(self, 0, "kl_weight", "fake_warmup")
        between(self, 0, 1, "tdm_weight", "eta")
        positive(self, "reward_timeout_s")
        if self.micro_batch and self.micro_batch % self.group:
            raise ValueError(f"micro_batch is {self.micro_batch}; it must hold whole groups of {self.group}")

    def rewards(self) -> RewardPool | None:
        """The reward's workers, which also refuse an unknown name; None where people's ratings are the only reward."""
        if self.reward is None and self.feedback is not None:
            return None
        return RewardPool(self.reward or "scenes", workers=self.reward_workers, timeout_s=self.reward_timeout_s)


class Rewards(Protocol):
    """Answers batches of pictures beside the trainer; `RewardPool` in real runs."""

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Future[Tensor]: ...

    def close(self) -> None: ...


class Reinforcement:
    """The student, the surrogate reward, the reward itself, and the three optimisers."""

    def __init__(self, config: TdmR1Config, student: Student, rewards: Rewards | None) -> None:
        """`rewards` of None needs `config.feedback`."""
        self.config, self.student, self.rewards = config, student, rewards
        self.groups, self.clock = config.groups, Clock()
        self.fake_warmup = 0 if config.start is not None else config.fake_warmup
        self.direct = config.preference == "generator"
        role = student.generator if self.direct else student.roles.new(stream(config.seed, 3))
        if config.surrogate is not None:
            state = torch.load(finished(config.surrogate / STATE_FILE, "tdm-r1"), weights_only=True)
            take_over(role.parameters, state["surrogate"]["role"], config.surrogate)
        self.surrogate = Surrogate(config, student, role, last_only=self.direct or config.reward_steps == "last")
        self.replay = None if config.feedback is None else Replay(config.feedback, student, config.group)
        self.generator = Learner("generator", student.generator, config.generator_rate, 0.0, student)
        self.fake = Learner("fake", student.fake, config.fake_rate, 0.0, student)
        self.preference = Learner("surrogate", role, config.surrogate_rate, 0.9, student)

    def prompts(self, seed: int) -> Iterator[Prompt]:
        """Training prompts: the rated ones, or those of the student's source."""
        return self.student.prompts("train", seed) if self.replay is None else self.replay.prompts(seed)

    def update(self, prompts: Sequence[Prompt], places: Sequence[int], step: int) -> dict[str, float]:
        """Rollout, reward, fake score, surrogate, generator."""
        config, student = self.config, self.student
        factor = trapezoid(step, config.steps, config.warmup, config.decay_steps)
        batch = student.batch(prompts, config.group, step, places)
        scalars: dict[str, float] = {}

        with self.clock("rollout"):
            trajectory = student.roll_out(batch, config.eta)
            rewards = self.ask(batch, trajectory)  # answered while the fake score trains
        with self.clock("fake"):
            for _ in range(0 if self.direct else config.fake_updates):
                scalars |= self.fake.phase(batch, factor, lambda c, part: student.fake_terms(part, trajectory.part(c)))
        with self.clock("reward"):  # what is left to wait for
            judged, advantage, notes = self.judged(batch, trajectory, rewards)
        if step >= self.fake_warmup:
            with self.clock("surrogate"):
                scalars |= self.preference.phase(
                    batch, factor, lambda c, part: self.surrogate.terms(part, judged.part(c), advantage[c])
                )
            with self.clock("generator"):
                if not self.direct:
                    scalars |= self.generator.phase(
                        batch, factor, lambda c, part: self.generator_terms(part, trajectory.part(c))
                    )
            self.surrogate.update_averages(step)
            student.average.update(step)
        return scalars | notes | self.clock.take()

    def judged(
        self, batch: Batch, trajectory: Trajectory, rewards: Callable[[], Tensor] | None
    ) -> tuple[Trajectory, Tensor, dict[str, float]]:
        """What the surrogate learns from, with its advantages (B,): the rollouts, or the pictures that people rated."""
        notes: dict[str, float] = {}
        if rewards is not None:
            advantage, notes = self.advantages(rewards())
            if self.replay is None:
                return trajectory, advantage, notes
        assert self.replay is not None
        replayed, ratings = self.replay.trajectory(batch)
        advantage, rated = self.advantages(ratings)
        return replayed, advantage, notes | {f"rated_{name}": value for name, value in rated.items()}

    def ask(self, batch: Batch, trajectory: Trajectory) -> Callable[[], Tensor] | None:
        """Hands the decoded pictures to the reward's workers, part by part; the result waits for all (B,)."""
        if self.rewards is None:
            return None
        futures = [
            self.rewards.submit(
                self.student.trainee.decode(trajectory.states[-1, chosen]),
                [prompt.text for prompt in part.prompts],
                [prompt.metadata for prompt in part.prompts],
            )
            for chosen, part in batch.parts(self.config.micro_batch)
        ]
        return lambda: torch.cat([future.result() for future in futures]).to(self.student.device)

    def advantages(self, rewards: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Advantages (B,), zero in groups whose rewards are all alike, which teach nothing and are counted."""
        group = self.config.group
        values = losses.binarised(rewards, group) if self.config.advantage == "binary" else rewards
        own = losses.group_std(values, group)
        std = own if self.config.advantage_scale == "prompt" else self.student.workers.std(values)
        constant = losses.constant(rewards, group).float().mean()
        notes = {"reward": float(rewards.mean()), "constant_groups": float(constant)}
        return losses.advantages(values, group, std), notes

    def generator_terms(self, batch: Batch, trajectory: Trajectory) -> dict[str, Tensor]:
        """kl D_kl + lambda D_cfg + (1 - lambda) D_reward; behind `trunc_steps` TDM alone, times lambda (eq. 11)."""
        config, student = self.config, self.student
        step = student.step(batch, trajectory, config.eta)
        kl, guidance = student.matching(batch, step)
        direction, scale = self.surrogate.direction(batch, step)
        reward = losses.pull(step.clean, direction, scale, config.metric)
        rewarded = step.k < config.trunc_steps
        if config.reward_steps == "last":
            rewarded = step.k == config.nfe - 1
        kl_weight = torch.where(rewarded, config.kl_weight, config.kl_weight * config.tdm_weight)
        return {
            "kl": kl_weight * kl,
            "guidance": config.tdm_weight * guidance,
            "reward": (1 - config.tdm_weight) * rewarded.float() * reward,
        }

    def state(self) -> dict[str, Any]:
        return {
            **self.student.state(),
            "surrogate": self.surrogate.state(),
            "generator_optimizer": self.generator.state(),
            "fake_optimizer": self.fake.state(),
            "surrogate_optimizer": self.preference.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.student.load(state)
        self.surrogate.load(state["surrogate"])
        self.generator.load(state["generator_optimizer"])
        self.fake.load(state["fake_optimizer"])
        self.preference.load(state["surrogate_optimizer"])

    def close(self) -> None:
        if self.rewards is not None:
            self.rewards.close()


def train(config: TdmR1Config) -> Path:
    """Reinforces, or resumes, and writes the averaged generator with its sigma table; returns the run folder."""
    return fit(_reinforcement(config), config, "tdm-r1")


def dry_run(config: TdmR1Config) -> str:
    """What the run would cost, after ten measured updates."""
    return estimate(_reinforcement(config), config)


def _reinforcement(config: TdmR1Config) -> Reinforcement:
    rewards = config.rewards()  # first: it may refuse
    student = make_student(config)
    if rewards is not None and config.reward is None and student.trainee.world is None:
        rewards.close()
        raise ConfigError(f"{config.checkpoint} has no world whose checker could reward it; name one with --reward")
    return Reinforcement(config, student, rewards)
