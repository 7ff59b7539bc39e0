"""The surrogate reward of TDM-R1, learned from groups by preference, and the direction that it gives the generator.

The same loss on the generator itself, at its clean pictures only, is direct preference optimisation (DGPO on the
few-step model), the ablation that blurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_finetune import losses
from tdm_finetune.ema import Ema
from tdm_finetune.process import bridge
from tdm_finetune.roles import Role
from tdm_finetune.rollout import Trajectory
from tdm_finetune.student import Batch, Step, Student, StudentConfig
from tdm_serve.config import at_least, between


@dataclass(frozen=True, slots=True)
class SurrogateConfig(StudentConfig):
    """The surrogate's options. Times are unshifted, in [0, 1]."""

    surrogate_rate: float = 1.2e-3  # 0 freezes it
    surrogate: Path | None = None  # a run whose surrogate this one starts from
    surrogate_draws: int = 1  # noised boundaries of each group an update; more make its gradient less noisy
    beta: float = 1.0  # sharpness of the group weight
    surrogate_anchor: float = 1e-3  # weight of its squared distance from the base
    old_clip: float = 1e-3  # a picture's error may change this much, against the fast average
    drift_clip: float = 0.05  # a group's squared distance from the base beyond which it is held
    reference: Literal["frozen", "ema"] = "frozen"
    reference_decay: float = 0.98
    surrogate_time_min: float = 0.29  # the surrogate learns above this noise
    generator_time_min: float = 0.1  # and is asked above this
    surrogate_guidance: float = 2.5  # 1 is off

    def __post_init__(self) -> None:
        StudentConfig.__post_init__(self)
        at_least(self, 1, "surrogate_draws")
        at_least(self, 0, "surrogate_rate", "beta", "surrogate_anchor", "old_clip", "drift_clip", "surrogate_guidance")
        between(self, 0, 1, "surrogate_time_min", "generator_time_min", "reference_decay")


def old_ramp(step: int) -> float:
    """The fast average that the clip compares with starts as a copy and slows down (official TDM-R1)."""
    return 0.001 + 0.001 * step


class Surrogate:
    """A role that is trained by group preference, with its fast average and its reference."""

    def __init__(self, config: SurrogateConfig, student: Student, role: Role, *, last_only: bool) -> None:
        self.config, self.student, self.role = config, student, role
        live = {str(i): p for i, p in enumerate(role.parameters)}
        self.old = Ema(live, 0.3, old_ramp)
        self.slow = Ema(live, config.reference_decay) if config.reference == "ema" else None
        # later boundaries are drawn more often, and weigh more (official `use_tweight`)
        self.step_weights = torch.arange(1.0, config.nfe + 1) / config.nfe
        self.chances = (
            self.step_weights * (torch.arange(config.nfe) == config.nfe - 1) if last_only else self.step_weights
        )

    def terms(self, batch: Batch, trajectory: Trajectory, advantage: Tensor) -> dict[str, Tensor]:
        """(B,) each: the mean over the draws."""
        draws = [self._drawn(batch, trajectory, advantage) for _ in range(self.config.surrogate_draws)]
        return {name: torch.stack([terms[name] for terms in draws]).mean(0) for name in draws[0]}

    def _drawn(self, batch: Batch, trajectory: Trajectory, advantage: Tensor) -> dict[str, Tensor]:
        """Group preference on a noised boundary (TDM-R1 eqs. 7-9): one boundary, level and noise a group."""
        config, student, process = self.config, self.student, self.student.process
        j = batch.draws.shared_choice(self.chances)
        each, low = torch.arange(len(j), device=student.device), student.levels[j + 1]
        start = trajectory.states[j + 1, each]
        floor = low.clamp_min(process.level_at(config.surrogate_time_min))
        tau = process.draw(floor, student.top.expand_as(low), batch.draws.shared_uniform())
        noise = batch.draws.shared_normal(*student.trainee.latent_shape)
        noisy = bridge(process, start, low, tau, noise)
        target = process.score_target(start, low, tau, noise)
        inputs = (noisy, tau, batch.conditioning)

        with torch.no_grad():
            base = student.roles.base(*inputs)
            base_error = losses.squared_error(base, target)
            with self.old.applied():
                old_error = losses.squared_error(self.role(*inputs), target)
            reference_error = base_error if self.slow is None else self._slow_error(inputs, target)
        output = self.role(*inputs)
        error, drift = losses.squared_error(output, target), losses.squared_error(output, base)

        weight = losses.group_weight(advantage, error, reference_error, config.beta, batch.group)
        stepped = losses.old_clip(advantage, error, old_error, config.old_clip)
        drifted = losses.drift_clip(advantage, error, base_error, drift, config.drift_clip, batch.group)
        rise = self.step_weights.to(student.device)[j]
        return {
            "preference": rise * losses.preference_loss(advantage, weight, error, stepped | drifted),
            "anchor": rise * config.surrogate_anchor * drift,
            "drift": drift.detach(),
            "group_weight": weight,
            "old_clipped": stepped.float(),
            "drift_clipped": drifted.float(),
        }

    def _slow_error(self, inputs: tuple[Tensor, Tensor, Any], target: Tensor) -> Tensor:
        assert self.slow is not None
        with self.slow.applied():
            return losses.squared_error(self.role(*inputs), target)

    @torch.no_grad()
    def direction(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Up the surrogate reward at a noised boundary, in clean space, and its scale (TDM-R1 eq. 11)."""
        config, student, process = self.config, self.student, self.student.process
        floor = step.low.clamp_min(process.level_at(config.generator_time_min))
        tau = process.draw(floor, student.top.expand_as(floor), batch.draws.uniform())
        noise = batch.draws.shared_normal(*student.trainee.latent_shape)
        noisy = bridge(process, step.following, step.low, tau, noise)

        def clean(role: Any, conditioning: Any) -> Tensor:
            return process.clean(noisy, tau, role(noisy, tau, conditioning))

        liked = clean(self.role, batch.conditioning)
        away = liked if config.surrogate_guidance == 1.0 else clean(self.role, batch.empty)
        if self.slow is None:
            reference = clean(student.roles.base, batch.conditioning)
        else:
            with self.slow.applied():
                reference = clean(self.role, batch.conditioning)
        direction = losses.reward_direction(liked, away, reference, config.surrogate_guidance)
        return direction, losses.scale_of(step.clean, reference + direction)

    def update_averages(self, step: int) -> None:
        self.old.update(step)
        if self.slow is not None:
            self.slow.update(step)

    def state(self) -> dict[str, Any]:
        slow = {} if self.slow is None else {"slow": self.slow.state_dict()}
        return {"role": self.role.parameters, "old": self.old.state_dict(), **slow}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.role.parameters, state["role"], strict=True):
                tensor.copy_(value)
        self.old.load_state_dict(state["old"])
        if self.slow is not None:
            self.slow.load_state_dict(state["slow"])
