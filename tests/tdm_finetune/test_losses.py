"""TDM's targets against closed forms in float64."""

from __future__ import annotations

import pytest
import torch

from tdm_finetune import losses


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def levels(random: torch.Generator, n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of noise levels with a gap, in float64."""
    low = torch.rand(n, generator=random, dtype=torch.float64) * 0.9
    return low, low + (0.99 - low) * (0.05 + 0.95 * torch.rand(n, generator=random, dtype=torch.float64))


def test_the_bridge_keeps_the_forward_marginal(random: torch.Generator) -> None:
    """Noising data to u and then bridging to sigma has signal 1 - sigma and noise variance sigma squared."""
    low, high = levels(random)
    r, b = losses.bridge_coefficients(low, high)
    assert torch.allclose(r * (1 - low), 1 - high)
    assert torch.allclose((r * low).square() + b.square(), high.square())


def test_the_bridge_target_is_the_bridges_derivative(random: torch.Generator) -> None:
    low, high = levels(random)
    start = torch.randn(64, 4, 3, 3, generator=random, dtype=torch.float64)
    noise = torch.randn(start.shape, generator=random, dtype=torch.float64)
    step = 1e-6
    after = losses.bridge(start, low, high + step, noise)
    before = losses.bridge(start, low, high - step, noise)
    target = losses.bridge_target(start, low, high, noise)
    assert torch.allclose((after - before) / (2 * step), target, rtol=1e-5, atol=1e-5)


def test_both_targets_agree_on_the_last_step(random: torch.Generator) -> None:
    """From clean data the bridge is ordinary noising, and both targets are noise - clean."""
    clean = torch.randn(8, 4, 3, 3, generator=random, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=random, dtype=torch.float64)
    zero, tau = torch.zeros(8, dtype=torch.float64), torch.rand(8, generator=random, dtype=torch.float64) * 0.9 + 0.05
    noisy = losses.bridge(clean, zero, tau, noise)
    assert torch.allclose(losses.bridge_target(clean, zero, tau, noise), noise - clean)
    assert torch.allclose(losses.anchored_target(noisy, tau, clean), noise - clean)


def test_the_bridge_target_recovers_the_true_score(random: torch.Generator) -> None:
    """Regressing it on x gives the Gaussian's score even where the boundary's noise follows from its clean part."""
    n, low, tau = 400_000, 0.5, 0.8
    clean = torch.randn(n, 1, 1, 1, generator=random, dtype=torch.float64)
    start = (1 - low) * clean + low * clean  # a deterministic step: its "noise" equals its clean prediction
    noise = torch.randn(n, 1, 1, 1, generator=random, dtype=torch.float64)
    u, s = torch.full((n,), low, dtype=torch.float64), torch.full((n,), tau, dtype=torch.float64)
    noisy = losses.bridge(start, u, s, noise)
    r, b = losses.bridge_coefficients(u[:1], s[:1])
    exact = -1.0 / float(r.square() + b.square())  # score of N(0, r^2 + b^2) is this times x

    def score_slope(target: torch.Tensor) -> float:
        velocity = float((target * noisy).sum() / noisy.square().sum())
        return -(1 + (1 - tau) * velocity) / tau  # eps = x + (1 - sigma) v, score = -eps / sigma

    assert score_slope(losses.bridge_target(start, u, s, noise)) == pytest.approx(exact, rel=0.02)
    # the anchored target's regression in closed form: another slope, the bias that buys its bounded variance
    anchored = -(1 + (1 - tau) * (1 + exact * float(r)) / tau) / tau
    assert score_slope(losses.anchored_target(noisy, s, clean)) == pytest.approx(anchored, rel=0.01)
    assert abs(anchored - exact) > 0.05 * abs(exact)


def test_shift_and_its_inverse() -> None:
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(losses.unshift_time(losses.shift_time(u, 3.0), 3.0), u)
    assert losses.shift_time(torch.tensor(0.75), 3.0).item() == pytest.approx(0.9)


def test_levels_stay_inside_their_interval(random: torch.Generator) -> None:
    low = torch.tensor([0.9, 0.75, 0.5, 0.0]).repeat(500)
    high = torch.tensor([1.0, 0.9, 0.75, 0.5]).repeat(500)
    drawn = losses.draw_level(low, high, 3.0, random)
    assert (drawn > low).all() and (drawn < high).all()
    shared = losses.draw_level(low, torch.ones_like(low), 3.0, random)
    assert (shared > low).all() and (shared < 1.0).all()
    assert shared[3::4].std() > 0.2


def test_the_generator_moves_along_the_direction_and_nothing_else_does(random: torch.Generator) -> None:
    clean = torch.randn(3, 4, 2, 2, generator=random, requires_grad=True)
    others = [torch.randn(3, 4, 2, 2, generator=random, requires_grad=True) for _ in range(3)]
    kl, guide, scale = losses.generator_direction(clean, *others, guidance=3.0)
    losses.generator_loss(clean, kl + guide, scale).backward()
    assert clean.grad is not None
    expected = -2 * (kl + guide) / scale / clean.numel()
    assert torch.allclose(clean.grad, expected.detach(), atol=1e-6)
    assert all(other.grad is None for other in others)


def test_no_gradient_where_the_fake_score_equals_an_unguided_teacher(random: torch.Generator) -> None:
    clean, teacher, away = (torch.randn(3, 4, 2, 2, generator=random) for _ in range(3))
    kl, guide, _ = losses.generator_direction(clean, teacher, away, teacher, guidance=1.0)
    assert not kl.any() and not guide.any()


def test_the_kl_direction_of_gaussians(random: torch.Generator) -> None:
    """Teacher N(m, 1), student N(0, 1): the clean-space direction points to m with the score difference's length."""
    mean, tau = 0.7, torch.full((6,), 0.6, dtype=torch.float64)
    noisy = torch.randn(6, 1, 1, 1, generator=random, dtype=torch.float64)
    s, a = 0.6, 0.4
    variance = a * a + s * s

    def clean_estimate(centre: float) -> torch.Tensor:
        score = -(noisy - a * centre) / variance
        return (noisy + s * s * score) / a  # Tweedie

    kl, _, _ = losses.generator_direction(noisy, clean_estimate(mean), noisy, clean_estimate(0.0), guidance=1.0)
    assert torch.allclose(kl, torch.full_like(kl, s * s * mean / variance))
    assert tau.shape == (6,)
