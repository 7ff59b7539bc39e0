"""Deterministic few-step trajectories, on the same rows as serving (`tdm_serve.sampling`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.sampling import Row

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents (B, C, H, W), sigma (B,)) -> velocity (B, C, H, W)


def conditional(denoiser: ZImageDenoiser, text: Tensor, lengths: Tensor) -> Velocity:
    """The denoiser with its prompts fixed: text (B, L, D) with `lengths` (B,) tokens. One evaluation per call."""
    refined = denoiser.refine_text(text, lengths)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(latents, denoiser.modulation(sigma), refined)

    return velocity


def guided(positive: Velocity, negative: Velocity, weight: float) -> Velocity:
    """Classifier-free guidance: negative + weight * (positive - negative); 1 is off and skips the second call."""
    if weight == 1.0:
        return positive

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        away = negative(latents, sigma)
        return away + weight * (positive(latents, sigma) - away)

    return velocity


@torch.no_grad()
def rollout(velocity: Velocity, noise: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """The K + 1 boundary states x_0 .. x_K of the sampler from `noise`; x_K is the clean latent (method notes 1.2)."""
    states = [noise]
    previous = torch.zeros_like(noise)
    for row in rows:
        latents = states[-1]
        clean = latents - row.sigma * velocity(latents, latents.new_full((len(latents),), row.sigma)).float()
        states.append(row.a * latents + row.b * clean + row.c * previous)
        previous = clean
    return states
