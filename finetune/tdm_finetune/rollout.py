"""Few-step trajectories, on the same rows as serving (`tdm_serve.sampling`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_finetune.process import Process, noise_of, per_picture
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents (B, C, H, W), level (B,)) -> the network's output


def conditional(denoiser: ZImageDenoiser, text: Tensor, lengths: Tensor) -> Predict:
    """The denoiser with its prompts fixed: text (B, L, D) with `lengths` (B,) tokens. One evaluation per call."""
    refined = denoiser.refine_text(text, lengths)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(latents, denoiser.modulation(sigma), refined)

    return velocity


def guided(positive: Predict, negative: Predict, weight: float) -> Predict:
    """Classifier-free guidance: negative + weight * (positive - negative); 1 is off and skips the second call."""
    if weight == 1.0:
        return positive

    def output(latents: Tensor, level: Tensor) -> Tensor:
        away = negative(latents, level)
        return away + weight * (positive(latents, level) - away)

    return output


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a rollout passes through: its boundary states x_0 .. x_K, and the clean prediction at each but the last.

    `fresh` is the noise that a stochastic rollout put in at each step; None for the deterministic one.
    """

    states: Tensor  # (K + 1, B, C, H, W)
    clean: Tensor  # (K, B, C, H, W)
    fresh: Tensor | None = None  # (K, B, C, H, W)

    def part(self, pictures: slice) -> Trajectory:
        """The same trajectory for some of the pictures."""
        fresh = None if self.fresh is None else self.fresh[:, pictures]
        return Trajectory(self.states[:, pictures], self.clean[:, pictures], fresh)


def advance(
    process: Process,
    x: Tensor,
    level: Tensor,
    low: Tensor,
    clean: Tensor,
    eta: float = 0.0,
    fresh: Tensor | None = None,
) -> Tensor:
    """From `level` down to `low` with the prediction `clean`: a clean + s (sqrt(1 - eta^2) noise + eta fresh).

    eta = 0 is DDIM (Euler for flow matching), the sampler of TDM; eta = 1 re-noises, the consistency models' sampler.
    """
    noise = noise_of(process, x, level, clean)
    if fresh is not None:
        noise = (1 - eta**2) ** 0.5 * noise + eta * fresh
    return per_picture(process.signal(low)) * clean + per_picture(process.spread(low)) * noise


@torch.no_grad()
def rollout(
    predict: Predict, process: Process, noise: Tensor, nfe: int, eta: float = 0.0, fresh: Tensor | None = None
) -> Trajectory:
    """`nfe` steps of the sampler from `noise` (B, C, H, W); the last state is the clean latent (method notes 1.2).

    With `eta` above 0, `fresh` (nfe, B, C, H, W) holds the noise of the stochastic steps.
    """
    states, predicted = [noise], list[Tensor]()
    levels = process.levels(nfe)
    for k, row in enumerate(process.rows(nfe)):
        latents = states[-1]
        level = latents.new_full((len(latents),), levels[k])
        clean = process.clean(latents, level, predict(latents, level).float())
        if fresh is None:
            states.append(row.a * latents + row.b * clean)
        else:
            low = torch.full_like(level, levels[k + 1])
            states.append(advance(process, latents, level, low, clean, eta, fresh[k]))
        predicted.append(clean)
    return Trajectory(torch.stack(states), torch.stack(predicted), fresh)
