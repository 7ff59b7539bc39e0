"""TDM and TDM-R1 in worlds whose scores are known exactly: pictures of 16 numbers around one of a few means.

The teacher's velocity is the closed form; roles add a small network to it, so everything that the trainers estimate can
be compared with what it should be. Sixteen numbers and not one, because DMD's normaliser is a mean over a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tdm_finetune.process import Flow, Process
from tdm_finetune.rollout import Trajectory, guided, rollout
from tdm_finetune.student import Batch, Student
from tdm_finetune.surrogate import Surrogate
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.tdm_r1 import Reinforcement, TdmR1Config
from tdm_finetune.trainee import Conditioning, Prompt
from tdm_finetune.workers import Workers


class MixtureNet(nn.Module):
    """Exact velocity for pictures N(m, spread^2) with m one of `means`, plus a trainable correction, zero at first."""

    def __init__(self, means: Sequence[float], spread: float) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means))
        self.variance = spread**2
        self.correction = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, latents: Tensor, level: Tensor, _condition: Tensor) -> Tensor:
        x, s = latents.flatten(1).unsqueeze(2), level.view(-1, 1, 1).to(latents.dtype)  # (B, 16, 1), (B, 1, 1)
        a = 1 - s
        total = a * a * self.variance + s * s
        likely = -((x - a * self.means).square() / (2 * total)).sum(1, keepdim=True)  # (B, 1, means)
        each = self.means + a * self.variance / total * (x - a * self.means)  # (B, 16, means)
        clean = (torch.softmax(likely, 2) * each).sum(2, keepdim=True)
        known = torch.cat((x, x.mean(1, keepdim=True).expand_as(x), s.expand_as(x)), 2)
        return ((x - clean) / s + self.correction(known)).view_as(latents)


class MixtureWorld:
    """A `Trainee` of 16 numbers a picture; as a picture they are 8-bit greys, 0 at 128."""

    adapter = None
    latent_shape = (1, 4, 4)

    def __init__(self, means: Sequence[float], spread: float) -> None:
        torch.manual_seed(0)
        self.process: Process = Flow(1.0)
        self.net: nn.Module = MixtureNet(means, spread).requires_grad_(False)

    def blocks(self) -> Sequence[nn.Module]:
        return [self.net]

    def linears(self) -> dict[str, nn.Linear]:
        return {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return (torch.zeros(len(prompts), 1),)

    def decode(self, latents: Tensor) -> Tensor:
        grey = (latents.float() * 32 + 128).round().clamp(0, 255).to(torch.uint8)
        return grey.permute(0, 2, 3, 1).expand(-1, 4, 4, 3)

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        while True:
            yield Prompt("a number", {})

    def judge(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, float]:
        return {}

    def save(self, folder: Path) -> None:
        raise AssertionError("nothing is saved here")


class At:
    """Rewards that answer at once."""

    def __init__(self, reward: Callable[[Tensor], Tensor]) -> None:
        self.reward = reward

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> Future[Tensor]:
        answer: Future[Tensor] = Future()
        answer.set_result(self.reward((images.float().mean((1, 2, 3)) - 128) / 32))
        return answer

    def close(self) -> None:
        """Nothing to close."""


def to_the_right(numbers: Tensor) -> Tensor:
    return (numbers > 0).float()


def samples(student: Student, n: int = 2000) -> Tensor:
    """Clean pictures of the live generator (n, 16)."""
    noise = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    condition = (torch.zeros(n, 1),)
    return student.trajectory(student.generator, noise, condition).states[-1].flatten(1)


def distilled(trainee: MixtureWorld, nfe: int) -> Student:
    """TDM in its exact form: the bridge target, and one fake score per interval."""
    config = TdmConfig(
        rank=0,
        precision="fp32",
        guidance=1.0,
        nfe=nfe,
        interval="separate",
        target="bridge",
        batch=64,
        steps=400,
        decay_steps=200,
        generator_rate=8e-3,
        fake_rate=2e-2,
        fake_updates=3,
    )
    student = Student(config, trainee, Workers())
    trainer = Distillation(config, student)
    for step in range(config.steps):
        trainer.update([Prompt("a number", {})] * config.batch, range(config.batch), step)
    return student


@pytest.mark.parametrize("nfe", [1, 2])
def test_distillation_gives_every_boundary_the_teachers_marginal(nfe: int) -> None:
    """One Euler step of the teacher maps all noise to the mean; TDM with K = 1 (DMD) must bring the spread back."""
    mean, spread = 0.7, 0.5
    trainee = MixtureWorld([mean], spread)
    noise = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    undistilled = rollout(lambda x, t: trainee.net(x, t, x), trainee.process, noise, nfe).states
    assert float(undistilled[-1].std()) < 0.5 * spread
    student = distilled(trainee, nfe)
    states = student.trajectory(student.generator, noise, (torch.zeros(1000, 1),)).states
    for k, level in enumerate(student.process.levels(nfe)[1:], start=1):
        assert float(states[k].mean()) == pytest.approx((1 - level) * mean, abs=0.06)
        exact = ((1 - level) ** 2 * spread**2 + level**2) ** 0.5
        assert float(states[k].std()) == pytest.approx(exact, rel=0.2)


def test_guidance_of_the_exact_scores_is_linear() -> None:
    """Guiding by w moves the prediction w times the distance between the conditional and the unconditional one."""
    world, other = MixtureWorld([1.0], 0.5), MixtureWorld([-1.0], 0.5)
    x, level = torch.randn(5, 1, 4, 4), torch.full((5,), 0.6)
    positive, negative = (lambda x, t, net=w.net: net(x, t, x) for w in (world, other))
    near, far = positive(x, level), negative(x, level)
    assert torch.allclose(guided(positive, negative, 3.0)(x, level), far + 3 * (near - far))


class TestSurrogate:
    """Two modes at -1.5 and 1.5; people like the right one."""

    groups, group = 8, 16

    def reinforcement(self) -> Reinforcement:
        config = TdmR1Config(
            rank=0,
            precision="fp32",
            guidance=1.0,
            target="bridge",
            groups=self.groups,
            group=self.group,
            steps=400,
            decay_steps=50,
            generator_rate=4e-4,
            fake_rate=4e-3,
            surrogate_rate=2e-3,
            surrogate_guidance=1.0,
            drift_clip=0.5,
            old_clip=0.05,
            fake_warmup=0,
            tdm_weight=0.1,
        )
        student = Student(config, MixtureWorld([-1.5, 1.5], 0.3), Workers())
        return Reinforcement(config, student, At(to_the_right))

    def surrogate(self, trainer: Reinforcement, sign: float, updates: int = 60) -> Surrogate:
        """Trains the surrogate alone, on rollouts of the untouched student."""
        student = trainer.student
        for step in range(updates):
            batch = student.batch([Prompt("", {})] * self.groups, self.group, step, range(self.groups))
            trajectory = student.roll_out(batch)
            reward = sign * to_the_right(trajectory.states[-1].mean((1, 2, 3)))
            advantage, _ = trainer.advantages(reward)
            trainer.preference.phase(batch, 1.0, self._terms(trainer, trajectory, advantage))
            trainer.surrogate.update_averages(step)
        return trainer.surrogate

    @staticmethod
    def _terms(
        trainer: Reinforcement, trajectory: Trajectory, advantage: Tensor
    ) -> Callable[[slice, Batch], Mapping[str, Tensor]]:
        return lambda c, part: trainer.surrogate.terms(part, trajectory.part(c), advantage[c])

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_its_gradient_points_to_the_rewarded_mode(self, sign: float) -> None:
        trainer = self.reinforcement()
        surrogate = self.surrogate(trainer, sign)
        student = trainer.student
        batch = student.batch([Prompt("", {})] * self.groups, self.group, 999, range(self.groups))
        step = student.step(batch, student.roll_out(batch))
        direction, _ = surrogate.direction(batch, step)
        assert sign * float(direction.mean()) > 0.02
        assert float((sign * direction > 0).float().mean()) > 0.8

    def test_an_untrained_one_has_no_direction(self) -> None:
        trainer = self.reinforcement()
        student = trainer.student
        batch = student.batch([Prompt("", {})] * 2, self.group, 0, range(2))
        direction, _ = trainer.surrogate.direction(batch, student.step(batch, student.roll_out(batch)))
        assert float(direction.abs().max()) < 1e-6

    def test_the_generator_moves_to_the_rewarded_mode_and_stays_on_the_teachers_pictures(self) -> None:
        trainer = self.reinforcement()
        before = float(to_the_right(samples(trainer.student).mean(1)).mean())
        prompts = [Prompt("a number", {})] * self.groups
        for step in range(trainer.config.steps):
            trainer.update(prompts, range(self.groups), step)
        after = samples(trainer.student)
        assert before == pytest.approx(0.5, abs=0.05)
        assert float(to_the_right(after.mean(1)).mean()) > 0.7
        on_a_mode = ((after.mean(1).abs() - 1.5).abs() < 0.5).float().mean()
        assert float(on_a_mode) > 0.8
