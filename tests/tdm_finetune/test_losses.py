"""The losses of TDM and TDM-R1 against closed forms, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tdm_finetune import losses

GROUP = 6


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def test_the_pull_moves_along_the_direction_and_nothing_else(random: torch.Generator) -> None:
    clean, teacher, away, fake = (normal(random, 3, 4, 2, 2).requires_grad_() for _ in range(4))
    direction = losses.kl_direction(teacher, fake) + losses.guidance_direction(teacher, away, 3.0)
    scale = losses.scale_of(clean, teacher)
    losses.pull(clean, direction, scale).mean().backward()
    assert clean.grad is not None
    assert torch.allclose(clean.grad, -2 * direction / scale / clean.numel())
    assert all(other.grad is None for other in (teacher, away, fake))


def test_the_huber_pull_is_linear_far_away_and_quadratic_near(random: torch.Generator) -> None:
    clean, scale = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for size, expected in ((1.0, 1.0 - losses.HUBER), (1e-5, 0.5 * 1e-10 / losses.HUBER)):
        assert float(losses.pull(clean, torch.full_like(clean, size), scale, "huber")) == pytest.approx(expected, 1e-3)


def test_no_direction_where_the_fake_score_equals_an_unguided_teacher(random: torch.Generator) -> None:
    teacher, away = normal(random, 3, 4, 2, 2), normal(random, 3, 4, 2, 2)
    assert not losses.kl_direction(teacher, teacher).any()
    assert not losses.guidance_direction(teacher, away, 1.0).any()


def test_the_kl_direction_of_gaussians(random: torch.Generator) -> None:
    """Teacher N(m, 1), student N(0, 1): the direction is s^2 / a times the difference of their exact scores."""
    mean, a, s = 0.7, 0.4, 0.6
    noisy = normal(random, 6, 1, 1, 1)
    variance = a * a + s * s

    def clean_estimate(centre: float) -> Tensor:
        return (noisy - s * s * (noisy - a * centre) / variance) / a  # Tweedie

    kl = losses.kl_direction(clean_estimate(mean), clean_estimate(0.0))
    assert torch.allclose(kl, torch.full_like(kl, s * s * mean / variance))


def test_following_the_kl_direction_descends_the_exact_kl() -> None:
    """For N(mu, 1) against N(m, 1), the KL at the noised level is (a (mu - m))^2 / 2 / variance: mu goes to m."""
    a, s, m = 0.4, 0.6, -0.8
    variance = a * a + s * s
    mu = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    random = torch.Generator().manual_seed(0)
    exact: list[float] = []
    for _ in range(60):
        exact.append(float((a * (mu.detach() - m)) ** 2 / 2 / variance))
        clean = mu + torch.randn(256, 1, 1, 1, generator=random, dtype=torch.float64)
        noisy = a * clean.detach() + s * torch.randn(256, 1, 1, 1, generator=random, dtype=torch.float64)
        teacher = (noisy - s * s * (noisy - a * m) / variance) / a
        fake = (noisy - s * s * (noisy - a * mu.detach()) / variance) / a
        unit = torch.ones(256, 1, 1, 1, dtype=torch.float64)
        loss = losses.pull(clean, losses.kl_direction(teacher, fake), unit).mean()
        (gradient,) = torch.autograd.grad(loss, mu)
        with torch.no_grad():
            mu -= 0.05 * gradient
    assert exact[-1] < 0.01 * exact[0]
    assert all(later <= earlier for earlier, later in pairwise(exact))


def test_the_reward_direction_is_the_surrogates_lead_over_its_reference(random: torch.Generator) -> None:
    surrogate, away, reference = (normal(random, 2, 4, 2, 2) for _ in range(3))
    assert torch.allclose(losses.reward_direction(surrogate, away, reference, 1.0), surrogate - reference)
    guided = losses.reward_direction(surrogate, away, reference, 2.5)
    assert torch.allclose(guided, (surrogate - reference) + 1.5 * (surrogate - away))


def test_advantages_sum_to_zero_so_log_z_cancels(random: torch.Generator) -> None:
    """Adding any number to a group's rewards, as log Z(c) would, changes nothing."""
    rewards = normal(random, 4 * GROUP)
    own = losses.group_std(rewards, GROUP)
    found = losses.advantages(rewards, GROUP, own)
    assert torch.allclose(found.view(4, GROUP).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-9)
    shifted = rewards + normal(random, 4).repeat_interleave(GROUP)
    assert torch.allclose(losses.advantages(shifted, GROUP, losses.group_std(shifted, GROUP)), found)


def test_advantages_are_clipped() -> None:
    rewards = torch.zeros(64)
    rewards[0] = 1.0
    found = losses.advantages(rewards, 64, losses.group_std(rewards, 64))
    assert float(found[0]) == losses.MAX_ADVANTAGE


def test_a_constant_group_has_no_advantage() -> None:
    rewards = torch.tensor([0.5] * GROUP + [0.0, 1.0] * (GROUP // 2))
    for std in (losses.group_std(rewards, GROUP), rewards.std()):
        found = losses.advantages(rewards, GROUP, std)
        assert not found[:GROUP].any() and found[GROUP:].all()


def test_binarised_advantages_keep_only_the_side(random: torch.Generator) -> None:
    values = torch.tensor([0.1, 0.2, 0.9, 0.95, 0.3, 0.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    sides = losses.binarised(values, GROUP)
    assert len(set(sides[:GROUP].tolist())) == 2
    assert (sides[:GROUP] > 0).tolist() == [False, False, True, True, False, False]
    assert float(sides[:GROUP].sum()) == pytest.approx(0, abs=1e-6)
    assert not sides[GROUP:].any()
    assert torch.equal(losses.binarised(values * 3 + 1, GROUP), sides)


@pytest.mark.parametrize("beta", [0.3, 1.0, 10.0])
def test_the_weighted_loss_has_the_gradient_of_minus_log_sigmoid(beta: float, random: torch.Generator) -> None:
    """-log sigmoid(-beta / G sum A (d - d_ref)) has exactly beta times it: beta sharpens W, it scales no step."""
    advantage = losses.centred(normal(random, 3 * GROUP), GROUP)
    reference = normal(random, 3 * GROUP).abs()
    error = normal(random, 3 * GROUP).abs().requires_grad_()
    inner = (advantage * (error - reference)).view(3, GROUP).mean(1)
    (exact,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(-beta * inner).mean(), error)
    weight = losses.group_weight(advantage, error, reference, beta, GROUP)
    unclipped = torch.zeros(3 * GROUP, dtype=torch.bool)
    (ours,) = torch.autograd.grad(losses.preference_loss(advantage, weight, error, unclipped).mean(), error)
    assert torch.allclose(ours * beta, exact, rtol=1e-10)


def test_a_constant_in_all_errors_of_a_group_cancels(random: torch.Generator) -> None:
    """log Z(c) once more: it would enter every picture's implicit reward of a group alike."""
    advantage = losses.centred(normal(random, GROUP), GROUP)
    error, reference = normal(random, GROUP).abs(), normal(random, GROUP).abs()
    weight = losses.group_weight(advantage, error, reference, 1.0, GROUP)
    assert torch.allclose(losses.group_weight(advantage, error + 7.0, reference, 1.0, GROUP), weight)


def test_an_undecided_group_weighs_one_half_and_a_decided_one_less(random: torch.Generator) -> None:
    advantage = torch.tensor([1.0, -1.0])
    same = torch.tensor([0.5, 0.5])
    assert losses.group_weight(advantage, same, same, 1.0, 2).tolist() == [0.5, 0.5]
    decided = torch.tensor([0.1, 0.9])  # the better picture is denoised better, the worse one worse
    assert float(losses.group_weight(advantage, decided, same, 10.0, 2)[0]) < 0.05


def test_the_old_clip_holds_only_what_has_moved_enough_as_wanted() -> None:
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    error = torch.tensor([0.90, 0.9999, 1.1, 1.1, 1.0001, 0.9])
    clipped = losses.old_clip(advantage, error, torch.ones(6), 1e-3)
    assert clipped.tolist() == [True, False, False, True, False, False]


def test_the_drift_clip_looks_at_the_groups_distance_and_the_pictures_side() -> None:
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    error, base = torch.tensor([0.5, 1.5, 1.5, 0.5]), torch.ones(4)
    far, near = torch.full((4,), 0.06), torch.full((4,), 0.04)
    assert losses.drift_clip(advantage, error, base, far, 0.05, 2).tolist() == [True, True, False, False]
    assert not losses.drift_clip(advantage, error, base, near, 0.05, 2).any()
    mixed = torch.tensor([0.0, 0.12, 0.0, 0.0])  # the first group's mean is over, the second's is not
    assert losses.drift_clip(advantage, error, base, mixed, 0.05, 2).tolist() == [True, True, False, False]


def test_a_clipped_picture_has_no_gradient(random: torch.Generator) -> None:
    error = normal(random, 4).requires_grad_()
    clipped = torch.tensor([True, False, True, False])
    ones = torch.ones(4, dtype=torch.float64)
    losses.preference_loss(ones, ones, error, clipped).sum().backward()
    assert error.grad is not None and error.grad.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_importance_weight_is_a_tempered_ratio(random: torch.Generator) -> None:
    fresh = normal(random, 5, 4, 8, 8)
    assert torch.allclose(losses.importance_weight(fresh, fresh), torch.ones(5, dtype=torch.float64))
    quieter = losses.importance_weight(0.5 * fresh, fresh)
    expected = (0.5 * 0.75 * fresh.square().mean((1, 2, 3))).exp()
    assert torch.allclose(quieter, expected)
    assert float(losses.importance_weight(0 * fresh, 10 * fresh).max()) == 20
