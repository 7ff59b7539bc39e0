"""From rewards to advantages: by hand, for constant groups, for likes; and rewards that are no scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_trainee import ToyTrainee, bits, finite, prompts, r1_config, reinforcement, same, step

from tdm_finetune.process import Process
from tdm_finetune.student import Batch
from tdm_finetune.tdm_r1 import Reinforcement
from tdm_serve.errors import ConfigError, RewardError

pytestmark = pytest.mark.usefixtures("toy_rewards", "closed_trainers")
UNUSED = Path("unused")
Scalars = list[dict[str, float]]


def made(process: Process | None = None, **values: Any) -> Reinforcement:
    return reinforcement(r1_config(UNUSED, **values), ToyTrainee(process))


def batch_of(trainer: Reinforcement, groups: int = 8, update: int = 50) -> Batch:
    return trainer.student.batch(prompts(groups, 9), trainer.config.group, update, range(groups))


def test_constant_groups_are_counted_and_teach_nothing() -> None:
    trainer = made(reward="toy-constant", surrogate_anchor=0.0)
    before = bits(trainer.surrogate.role.parameters)
    scalars = step(trainer, 2)
    assert [row["constant_groups"] for row in scalars] == [1.0, 1.0]
    assert [row["surrogate_gradient_norm"] for row in scalars] == [0.0, 0.0]
    assert same(trainer.surrogate.role.parameters, before)


@pytest.mark.parametrize("scale", ["batch", "prompt"])
@pytest.mark.parametrize("kind", ["value", "binary"])
def test_one_constant_group_among_others(scale: str, kind: str) -> None:
    """Exactly zero, also where the mean of equal numbers is not that number."""
    trainer = made(advantage_scale=scale, advantage=kind, groups=3, group=7)
    alike = torch.tensor([0.1] * 7 + [0.7] * 7)
    assert not torch.equal(alike.view(2, 7).mean(1), alike[::7])
    rewards = torch.cat([alike, torch.tensor([0.0, 0.2, 0.9, 0.3, 0.1, 0.1, 0.0])])
    advantage, notes = trainer.advantages(rewards)
    assert notes["constant_groups"] == pytest.approx(2 / 3) and notes["reward"] == pytest.approx(7.2 / 21)
    assert not advantage[:14].any()
    assert torch.equal(advantage[14:] > 0, torch.tensor([False, False, True, True, False, False, False]))
    assert float(advantage.sum()) == pytest.approx(0.0, abs=1e-5)


def test_small_differences_are_no_constants() -> None:
    """Some rewards, such as compressibility, differ by little only."""
    advantage, notes = made(advantage_scale="prompt").advantages(torch.arange(16) * 1e-5)
    assert notes["constant_groups"] == 0 and (advantage[1::4] < 0).all() and (advantage[3::4] > 0).all()


def test_advantages_by_hand() -> None:
    """(r - mean) / (std + 1e-4), with the prompt's or the whole batch's deviation, clipped to 5."""
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0, *([0.0] * 120)])
    own, whole = (made(advantage_scale=scale).advantages(rewards)[0] for scale in ("prompt", "batch"))
    centred = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    torch.testing.assert_close(own[:4], centred / (1.25**0.5 + 1e-4))
    std = float(rewards.std(correction=0))
    torch.testing.assert_close(whole[:4], centred / (std + 1e-4))
    assert 3 / (std + 1e-4) > 5 and float(whole[7]) == 5.0


def test_likes_count_by_their_side_only() -> None:
    trainer = made(advantage="binary")
    far, near = torch.tensor([0.0, 0.1, 0.0, 9.0] * 4), torch.tensor([3.0, 3.1, 3.0, 3.9] * 4)
    one, other = (trainer.advantages(rewards)[0] for rewards in (far, near))
    assert torch.equal(one, other)
    assert (one[3::4] > 0).all() and (one[:3] < 0).all() and torch.equal(one[0], one[1])
    trainer = made(reward="toy-sign", advantage="binary")
    assert all(map(finite, step(trainer, 2)))


@pytest.mark.parametrize(("reward", "complaint"), [("toy-nan", "nan for sample 2"), ("toy-short", "shape (15,)")])
def test_what_is_no_score_ends_the_update(reward: str, complaint: str) -> None:
    trainer = made(reward=reward)
    before = bits(trainer.student.generator.parameters)
    with pytest.raises(RewardError) as caught:
        step(trainer, 1)
    assert complaint in str(caught.value) and reward in str(caught.value)
    assert same(trainer.student.generator.parameters, before)


def test_unknown_rewards_are_told_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'toys' is unknown .*toy-sign"):
        made(reward="toys")


def test_rewards_come_in_parts_and_mixtures() -> None:
    whole, parted = (
        made(reward="toy:0.5,toy-sign:2"),
        made(reward="toy:0.5,toy-sign:2", micro_batch=4, reward_workers=2),
    )
    batch = batch_of(whole)
    trajectory = whole.student.roll_out(batch)
    one, other = (trainer.ask(batch, trajectory)() for trainer in (whole, parted))
    assert one.shape == (32,) and torch.equal(one, other)
