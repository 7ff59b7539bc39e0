"""TDM: distils the multi-step teacher into a K-step generator by trajectory distribution matching.

One update, read top to bottom in `Distillation.update`: roll out, train the fake score, train the generator. No
pictures are needed, only prompts. Guidance is baked in as its own term, so the student needs one evaluation per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tdm_finetune.clock import Clock
from tdm_finetune.cost import estimate
from tdm_finetune.fit import fit, make_student
from tdm_finetune.learner import Learner
from tdm_finetune.rollout import Trajectory
from tdm_finetune.run import trapezoid
from tdm_finetune.student import Batch, Student, StudentConfig
from tdm_finetune.trainee import Prompt
from tdm_serve.config import at_least
from tdm_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TdmConfig(StudentConfig):
    """`tdm-serve finetune tdm`."""

    batch: int = 64  # prompts an update, one picture each

    def __post_init__(self) -> None:
        StudentConfig.__post_init__(self)
        at_least(self, 1, "batch", "fake_updates")


class Distillation:
    """The student and its two optimisers."""

    def __init__(self, config: TdmConfig, student: Student) -> None:
        if student.trainee.adapter is not None:
            raise ConfigError(
                f"checkpoint {config.checkpoint!r} is an adapter on a base; the base is what is distilled: "
                "default-teacher or FOLDER@teacher"
            )
        self.config, self.student, self.groups, self.clock = config, student, config.batch, Clock()
        self.fake_warmup = 0
        # beta1 = 0: both roles chase a moving target (TDM and TDM-R1's settings)
        self.generator = Learner("generator", student.generator, config.generator_rate, 0.0, student)
        self.fake = Learner("fake", student.fake, config.fake_rate, 0.0, student)

    def prompts(self, seed: int) -> Iterator[Prompt]:
        return self.student.prompts("train", seed)

    def update(self, prompts: Sequence[Prompt], places: Sequence[int], step: int) -> dict[str, float]:
        """Roll out, train the fake score, train the generator."""
        config, student = self.config, self.student
        factor = trapezoid(step, config.steps, config.warmup, config.decay_steps)
        batch = student.batch(prompts, 1, step, places)
        scalars: dict[str, float] = {}
        with self.clock("rollout"):
            trajectory = student.roll_out(batch)
        with self.clock("fake"):
            for _ in range(config.fake_updates):
                scalars |= self.fake.phase(batch, factor, lambda c, part: student.fake_terms(part, trajectory.part(c)))
        with self.clock("generator"):
            scalars |= self.generator.phase(
                batch, factor, lambda c, part: self.generator_terms(part, trajectory.part(c))
            )
        student.average.update(step)
        return scalars | self.clock.take()

    def generator_terms(self, batch: Batch, trajectory: Trajectory) -> dict[str, Tensor]:
        """Reverse KL against the teacher, and guidance, at one noised boundary per picture."""
        kl, guidance = self.student.matching(batch, self.student.step(batch, trajectory))
        return {"kl": kl, "guidance": guidance}

    def state(self) -> dict[str, Any]:
        optimizers = {"generator_optimizer": self.generator.state(), "fake_optimizer": self.fake.state()}
        return {**self.student.state(), **optimizers}

    def load(self, state: dict[str, Any]) -> None:
        self.student.load(state)
        self.generator.load(state["generator_optimizer"])
        self.fake.load(state["fake_optimizer"])

    def close(self) -> None:
        """Nothing outlives the run."""


def train(config: TdmConfig) -> Path:
    """Distils, or resumes, and writes the averaged generator with its sigma table; returns the run folder."""
    return fit(Distillation(config, make_student(config)), config, "tdm")


def dry_run(config: TdmConfig) -> str:
    """What the run would cost, after ten measured updates."""
    return estimate(Distillation(config, make_student(config)), config)
