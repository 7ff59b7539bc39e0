"""Sampler rows against diffusers' schedulers, and against the closed form of a deterministic flow."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tdm_serve.errors import ConfigError
from tdm_serve.sampling import Row, plan, rows_for, sigma_grid


def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth stand-in for the network."""
    return torch.sin(3 * latents) + sigma * latents


def run(rows: tuple[Row, ...], latents: torch.Tensor) -> torch.Tensor:
    previous = torch.zeros_like(latents)
    for row in rows:
        clean = latents - row.sigma * velocity(latents, row.sigma)
        latents, previous = row.a * latents + row.b * clean + row.c * previous, clean
    return latents


@pytest.mark.parametrize("nfe", [1, 2, 4, 7, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_euler_equals_diffusers(nfe: int, shift: float) -> None:
    noise = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0 - i / nfe for i in range(nfe)])
    latents = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=True):
        latents = scheduler.step(velocity(latents, sigma), t, latents).prev_sample
    assert (run(plan("euler", nfe, shift), noise) - latents).abs().max() < 1e-5


@pytest.mark.parametrize("nfe", [2, 4, 10])
def test_dpmpp_2m_equals_diffusers(nfe: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(nfe)
    noise = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    latents = noise
    sigmas = scheduler.sigmas[:-1].tolist()
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        latents = scheduler.step(velocity(latents, sigma), t, latents).prev_sample
    assert (run(rows_for("dpmpp_2m", sigmas), noise) - latents).abs().max() < 1e-5


def test_z_images_published_table() -> None:
    assert sigma_grid(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5), abs=1e-12)


def test_a_row_ends_on_its_prediction() -> None:
    last = plan("euler", 4, 3.0)[-1]
    assert (last.a, last.b) == (0.0, 1.0)


@pytest.mark.parametrize("sigmas", [[], [0.5, 0.5], [0.5, 0.9], [1.2, 0.5], [1.0, 0.0]])
def test_bad_tables_are_refused_with_their_values(sigmas: list[float]) -> None:
    with pytest.raises(ConfigError, match="fall strictly"):
        rows_for("euler", sigmas)


def test_unknown_sampler_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="dpmpp_2m, euler"):
        rows_for("heun", [1.0])


@pytest.mark.parametrize(("nfe", "shift", "word"), [(0, 3.0, "nfe"), (4, 0.0, "shift")])
def test_bad_grids_name_the_parameter(nfe: int, shift: float, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        sigma_grid(nfe, shift)
