"""Both forward processes against closed forms, in float64, and against diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tdm_finetune.process import Diffusion, Flow, Process, bridge, bridge_coefficients, noise_of, per_picture
from tdm_finetune.rollout import advance, rollout
from tdm_serve.errors import ConfigError
from tdm_serve.sampling import ddim

ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
PROCESSES = {
    "flow": Flow(3.0),
    "epsilon": Diffusion(ALPHAS, prediction="epsilon", top=900),
    "v": Diffusion(ALPHAS, prediction="v"),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def normal(random: torch.Generator, n: int = 64, side: int = 3) -> Tensor:
    return torch.randn(n, 4, side, side, generator=random, dtype=torch.float64)


def levels(process: Process, random: torch.Generator, n: int = 64) -> tuple[Tensor, Tensor]:
    """Pairs of levels, the second above the first by the gap at least."""
    top = process.levels(1)[0]
    low = torch.rand(n, generator=random, dtype=torch.float64) * 0.9 * top
    low = low if isinstance(process, Flow) else low.round()
    return low, process.draw(low, torch.full_like(low, top), torch.rand(n, generator=random, dtype=torch.float64))


@every_process
def test_the_bridge_keeps_the_forward_marginal(process: Process, random: torch.Generator) -> None:
    """Noising data to u and then bridging to a higher level has that level's signal and noise variance."""
    low, high = levels(process, random)
    r, b = bridge_coefficients(process, low, high)
    assert torch.allclose(r * process.signal(low), process.signal(high))
    assert torch.allclose((r * process.spread(low)).square() + b.square(), process.spread(high).square())


@every_process
def test_target_and_clean_are_inverses(process: Process, random: torch.Generator) -> None:
    _, level = levels(process, random)
    x, clean = normal(random), normal(random)
    assert torch.allclose(process.clean(x, level, process.target(x, level, clean)), clean, rtol=1e-9, atol=1e-9)


@every_process
def test_the_target_of_noised_data_is_what_the_network_is_pretrained_on(
    process: Process, random: torch.Generator
) -> None:
    _, level = levels(process, random)
    clean, noise = normal(random), normal(random)
    a, s = per_picture(process.signal(level)), per_picture(process.spread(level))
    expected = {"flow": noise - clean, "epsilon": noise, "v": a * noise - s * clean}
    name = next(name for name, known in PROCESSES.items() if known is process)
    x = a * clean + s * noise
    assert torch.allclose(process.target(x, level, clean), expected[name], rtol=1e-8, atol=1e-8)
    assert torch.allclose(noise_of(process, x, level, clean), noise)


def test_the_flow_score_target_is_the_bridges_derivative(random: torch.Generator) -> None:
    flow = PROCESSES["flow"]
    low, high = levels(flow, random)
    start, noise, step = normal(random), normal(random), 1e-6
    after = bridge(flow, start, low, high + step, noise)
    before = bridge(flow, start, low, high - step, noise)
    target = flow.score_target(start, low, high, noise)
    assert torch.allclose((after - before) / (2 * step), target, rtol=1e-5, atol=1e-5)


def test_the_flow_score_target_is_finite_at_pure_noise(random: torch.Generator) -> None:
    low = torch.tensor([0.5], dtype=torch.float64)
    target = PROCESSES["flow"].score_target(normal(random, 1), low, torch.ones_like(low), normal(random, 1))
    assert target.isfinite().all()


@every_process
def test_both_targets_agree_on_the_last_step(process: Process, random: torch.Generator) -> None:
    """From clean data the bridge is ordinary noising, and both targets are the pre-training target."""
    _, high = levels(process, random)
    clean, noise, zero = normal(random), normal(random), torch.zeros(64, dtype=torch.float64)
    noisy = bridge(process, clean, zero, high, noise)
    expected = process.target(noisy, high, clean)
    assert torch.allclose(process.score_target(clean, zero, high, noise), expected, rtol=1e-6, atol=1e-7)


@every_process
def test_the_score_target_is_unbiased_and_the_anchored_one_is_not(process: Process, random: torch.Generator) -> None:
    """Regressed on x, it gives the marginal's score even where the boundary's noise follows from its clean part."""
    n = 300_000
    top = process.levels(1)[0]
    shares = (0.5, 0.8) if isinstance(process, Flow) else (0.2, 0.3)  # diffusion forgets sooner on its clock
    u, t = (torch.full((n,), share * top, dtype=torch.float64) for share in shares)
    clean = torch.randn(n, 1, 1, 1, generator=random, dtype=torch.float64)
    start = per_picture(process.signal(u) + process.spread(u)) * clean  # a deterministic step whose noise is its clean
    noise = torch.randn(n, 1, 1, 1, generator=random, dtype=torch.float64)
    noisy = bridge(process, start, u, t, noise)
    r, b = (c[0] for c in bridge_coefficients(process, u, t))
    spread = float(process.signal(u)[0] + process.spread(u)[0])
    exact = -1.0 / float((r * spread).square() + b.square())  # the score of N(0, variance) is this times x

    def score_slope(target: Tensor) -> float:
        output = per_picture((target * noisy).sum((1, 2, 3)).sum() / noisy.square().sum() * torch.ones(1)) * noisy[:1]
        predicted = process.clean(noisy[:1], t[:1], output)
        return -float(noise_of(process, noisy[:1], t[:1], predicted) / noisy[:1]) / float(process.spread(t)[0])

    assert score_slope(process.score_target(start, u, t, noise)) == pytest.approx(exact, rel=0.02)
    biased = score_slope(process.target(noisy, t, clean))
    assert abs(biased - exact) > 0.05 * abs(exact)


@every_process
@pytest.mark.parametrize("nfe", range(1, 9))
def test_the_sampler_solves_a_gaussian_world_step_by_step(process: Process, nfe: int, random: torch.Generator) -> None:
    """Against the closed form of DDIM for N(m, v): each step rescales x by known numbers."""
    mean, variance = 0.3, 0.5
    noise = normal(random, 5)

    def predict(x: Tensor, level: Tensor) -> Tensor:
        a, s = per_picture(process.signal(level)), per_picture(process.spread(level))
        clean = mean + a * variance / (a * a * variance + s * s) * (x - a * mean)
        return process.target(x, level, clean)

    # rollout works in the network's float32; the closed form below is float64
    trajectory = rollout(predict, process, noise, nfe)
    x = noise
    found = process.levels(nfe)
    for k in range(nfe):
        level, low = (
            torch.full((5,), found[k], dtype=torch.float64),
            torch.full((5,), found[k + 1], dtype=torch.float64),
        )
        a, s = process.signal(level)[0], process.spread(level)[0]
        clean = mean + a * variance / (a * a * variance + s * s) * (x - a * mean)
        x = process.signal(low)[0] * clean + process.spread(low)[0] * (x - a * clean) / s
        assert torch.allclose(trajectory.states[k + 1].double(), x, rtol=1e-4, atol=1e-4)
        assert torch.allclose(trajectory.clean[k].double(), clean, rtol=1e-4, atol=1e-4)


@every_process
def test_advance_is_the_rows_update(process: Process, random: torch.Generator) -> None:
    """Losses step with `advance`, rollouts with the rows of serving: they must be one and the same step."""
    found = process.levels(4)
    x, clean = normal(random, 2), normal(random, 2)
    for k, row in enumerate(process.rows(4)):
        level, low = (torch.full((2,), found[i], dtype=torch.float64) for i in (k, k + 1))
        assert torch.allclose(advance(process, x, level, low, clean), row.a * x + row.b * clean, rtol=1e-9, atol=1e-9)


def test_a_stochastic_step_keeps_the_noise_level(random: torch.Generator) -> None:
    """sqrt(1 - eta^2) of the old noise and eta of fresh noise have unit variance together; eta = 1 forgets the old."""
    flow = PROCESSES["flow"]
    x, clean, fresh = normal(random), normal(random), normal(random)
    level, low = torch.full((64,), 0.9, dtype=torch.float64), torch.full((64,), 0.5, dtype=torch.float64)
    assert torch.allclose(advance(flow, x, level, low, clean, 1.0, fresh), 0.5 * clean + 0.5 * fresh)
    half = advance(flow, 0.1 * clean + 0.9 * normal(random, 64, 3), level, low, clean, 0.6, fresh)
    assert float((half - 0.5 * clean).var()) == pytest.approx(0.25, rel=0.1)


def test_published_grids() -> None:
    assert Flow(3.0).levels(4) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    pixart = Diffusion(ALPHAS, top=900)
    assert pixart.levels(4) == (900, 675, 450, 225, 0)
    assert [row.t for row in pixart.rows(4)] == [899, 674, 449, 224]


def test_ddim_rows_are_diffusers_steps(random: torch.Generator) -> None:
    """Four steps of diffusers' DDIM on the same times and predictions."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(4)
    times = [int(t) for t in scheduler.timesteps]
    alphas = [ALPHAS[t] for t in times] + [1.0]
    x = torch.randn(1, 4, 2, 2, generator=random)
    ours = x.clone()
    for row, time in zip(ddim(times, alphas), times, strict=True):
        epsilon = torch.randn(x.shape, generator=random)
        x = scheduler.step(epsilon, time, x).prev_sample
        clean = (ours - row.sigma * epsilon) / (1 - row.sigma**2) ** 0.5
        ours = row.a * ours + row.b * clean
        assert torch.allclose(ours, x, rtol=2e-3, atol=2e-4)  # diffusers keeps its alphas in float32


def test_drawn_levels_stay_inside_their_interval(random: torch.Generator) -> None:
    flow = Flow(3.0)
    low = torch.tensor([0.9, 0.75, 0.5, 0.0]).repeat(500)
    high = torch.tensor([1.0, 0.9, 0.75, 0.5]).repeat(500)
    u = torch.rand(2000, generator=random)
    drawn = flow.draw(low, high, u)
    assert (drawn > low).all() and (drawn < high).all()
    shared = flow.draw(low, torch.ones_like(low), u)
    assert (shared > low).all() and (shared < 1.0).all()
    assert shared[3::4].std() > 0.2
    steps = PROCESSES["epsilon"].draw(torch.full_like(u, 225.0), torch.full_like(u, 450.0), u)
    assert (steps > 225).all() and (steps < 450).all() and torch.equal(steps, steps.round())


def test_unshifted_times_become_levels() -> None:
    assert Flow(3.0).level_at(0.75) == pytest.approx(0.9)
    assert Diffusion(ALPHAS, top=900).level_at(0.5) == 450


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Flow(0.0), "shift is 0.0; it must be above 0"),
        (lambda: Diffusion(ALPHAS, top=1001), "top is 1001; it must be between 1 and the table's 1000"),
        (lambda: Diffusion(ALPHAS, top=10).levels(11), "nfe is 11; it must be between 1 and 10"),
        (lambda: ddim([1.0], [0.5]), "1 times need 2 alphas"),
    ],
)
def test_bad_numbers_are_named(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=says):
        make()
