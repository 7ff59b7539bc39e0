"""TDM's losses and targets as pure functions on tensors. Equation numbers are those of the method notes' sources.

Flow matching: x = (1 - s) * clean + s * noise, velocity v = noise - clean, clean = x - s * v. Everything is float32;
`sigma` arguments are (B,) and broadcast over pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAP = 0.02  # in unshifted time: the least distance between a boundary and the level it is noised to
MIN_SPREAD = 1e-8


def per_picture(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Sampler time to noise level: s * u / (1 + (s - 1) * u)."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(sigma: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_time`."""
    return sigma / (shift - (shift - 1) * sigma)


def clean_of(latents: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """Predicted clean latents x - sigma * v."""
    return latents - per_picture(sigma) * velocity


def bridge(start: Tensor, start_sigma: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Noises `start` from level u = `start_sigma` up to `sigma`: x = r x_u + b n (TDM, sub-interval noising).

    r = (1 - sigma) / (1 - u) and b^2 = sigma^2 - (r u)^2, so the marginal at `sigma` is the forward process's.
    """
    r, b = bridge_coefficients(start_sigma, sigma)
    return per_picture(r) * start + per_picture(b) * noise


def bridge_coefficients(start_sigma: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(r, b) of the bridge between two noise levels, `start_sigma` < `sigma`."""
    r = (1 - sigma) / (1 - start_sigma)
    b = (sigma.square() - (r * start_sigma).square()).clamp_min(MIN_SPREAD).sqrt()
    return r, b


def anchored_target(noisy: Tensor, sigma: Tensor, clean: Tensor) -> Tensor:
    """Velocity that leads from `noisy` to the known prediction `clean`: (x - x0) / sigma. Bounded variance."""
    return (noisy - clean) / per_picture(sigma)


def bridge_target(start: Tensor, start_sigma: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Exact denoising-score-matching velocity when `start` is the data: d/dsigma of the bridge.

    v = -x_u / (1 - u) + (n / b) (sigma + u^2 r / (1 - u)). Its variance grows as sigma / b towards `start_sigma`.
    """
    r, b = bridge_coefficients(start_sigma, sigma)
    pull = (sigma + start_sigma.square() * r / (1 - start_sigma)) / b
    return per_picture(pull) * noise - start / per_picture(1 - start_sigma)


def draw_level(low: Tensor, high: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels (B,) uniform in unshifted time between `low` + gap and `high` - gap / 2, all given as levels."""
    bottom = unshift_time(low, shift) + GAP
    top = unshift_time(high, shift) - GAP / 2
    u = torch.rand(low.shape, generator=generator)
    return shift_time(bottom + (top - bottom).clamp_min(0) * u, shift)


def generator_direction(
    clean: Tensor, teacher: Tensor, teacher_away: Tensor, fake: Tensor, guidance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The two directions of TDM's generator gradient in clean space, and their scale.

    KL: teacher - fake (reverse KL, TDM eq. 8). Guidance as its own term: (w - 1) (teacher - unconditional teacher).
    Scale: per-picture mean |clean - guided teacher| (DMD's normaliser), (B, 1, 1, 1).
    """
    kl = teacher - fake
    guide = (guidance - 1.0) * (teacher - teacher_away)
    scale = (clean - teacher - guide).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return kl, guide, scale


def generator_loss(clean: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    """|x0 - stop(x0 + direction)|^2 / scale: its gradient moves `clean` along `direction`; nothing else gets one."""
    goal = (clean + direction).detach()
    return ((clean - goal).square() / scale.detach()).mean()
