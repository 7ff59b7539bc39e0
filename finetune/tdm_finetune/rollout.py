"""Deterministic few-step trajectories, on the same rows as serving (`tdm_serve.sampling`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a rollout passes through: its boundary states x_0 .. x_K, and the clean prediction at each but the last."""

    states: Tensor  # (K + 1, B, C, H, W)
    clean: Tensor  # (K, B, C, H, W)


@torch.no_grad()
def rollout(velocity: Velocity, noise: Tensor, rows: Sequence[Row]) -> Trajectory:
    """K steps of the sampler from `noise` (B, C, H, W); the last state is the clean latent (method notes 1.2)."""
    states = [noise]
    predicted = [torch.zeros_like(noise)]  # what stands in for the prediction before the first
    for row in rows:
        latents = states[-1]
        clean = latents - row.sigma * velocity(latents, latents.new_full((len(latents),), row.sigma)).float()
        states.append(row.a * latents + row.b * clean + row.c * predicted[-1])
        predicted.append(clean)
    return Trajectory(torch.stack(states), torch.stack(predicted[1:]))
