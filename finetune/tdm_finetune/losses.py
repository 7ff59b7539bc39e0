"""The losses of TDM and TDM-R1 as pure functions on tensors.

Numbers are those of the papers: TDM (arXiv 2503.06674), DGPO (2510.08425), TDM-R1 (2603.07700). Pictures are latents
(B, C, H, W); per-picture numbers are (B,) in groups of `group` pictures of one prompt, whole groups in a row.
Whatever is a direction or a weight is detached here: the caller cannot leak a gradient through it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

HUBER = 1e-3  # width of the pseudo-Huber bowl (TDM)
MIN_SCALE = 1e-6
MAX_ADVANTAGE = 5.0
MIN_STD = 1e-4
ROUNDING = 1e-6  # of float32 rewards


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each picture (B,)."""
    return (predicted - target).square().mean((1, 2, 3))


def kl_direction(teacher: Tensor, fake: Tensor) -> Tensor:
    """Down the reverse KL in clean space: teacher - fake, which is s^2 / a times the score difference (TDM eq. 8)."""
    return (teacher - fake).detach()


def guidance_direction(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Guidance as its own term: (w - 1) (conditional - unconditional); TDM-R1 takes it as one more reward."""
    return ((weight - 1.0) * (conditional - unconditional)).detach()


def reward_direction(surrogate: Tensor, away: Tensor, reference: Tensor, weight: float) -> Tensor:
    """Up the surrogate reward in clean space: its guided prediction minus the reference's (TDM-R1 eq. 11).

    The reward is a log density ratio, so its gradient is a difference of scores. `weight` guides the surrogate:
    1 is off, more amplifies what it has learned about the prompt.
    """
    return (away + weight * (surrogate - away) - reference).detach()


def scale_of(clean: Tensor, goal: Tensor) -> Tensor:
    """Mean |clean - goal| of each picture (B, 1, 1, 1): the normaliser of DMD's gradient."""
    return (clean - goal).abs().mean((1, 2, 3), keepdim=True).clamp_min(MIN_SCALE).detach()


def pull(clean: Tensor, direction: Tensor, scale: Tensor, metric: Literal["squared", "huber"] = "squared") -> Tensor:
    """(B,) d(x0, stop(x0 + direction)) / scale: its gradient moves `clean` along `direction` and nothing else."""
    error = clean - (clean + direction).detach()
    distance = error.square() if metric == "squared" else (error.square() + HUBER**2).sqrt() - HUBER
    return (distance / scale.detach()).mean((1, 2, 3))


def importance_weight(mixed_noise: Tensor, fresh_noise: Tensor) -> Tensor:
    """exp(-mean(mixed^2) / 2) / exp(-mean(fresh^2) / 2) (B,), kept in [1/20, 20]: TDM's tempered density ratio.

    Corrects the anchored target for noise that is mixed from the trajectory's own and fresh noise.
    """
    exponent = 0.5 * (fresh_noise.square().mean((1, 2, 3)) - mixed_noise.square().mean((1, 2, 3)))
    return exponent.exp().clamp(1 / 20, 20).detach()


def constant(rewards: Tensor, group: int) -> Tensor:
    """True (B,) where all rewards of the group are alike, up to rounding: such a group teaches nothing."""
    grouped = rewards.view(-1, group)
    spread = grouped.amax(1) - grouped.amin(1)
    return (spread <= ROUNDING * grouped.abs().amax(1)).repeat_interleave(group)


def centred(rewards: Tensor, group: int) -> Tensor:
    """Rewards (B,) minus their group's mean; sums to zero in every group, so log Z cancels (DGPO section 3)."""
    grouped = rewards.view(-1, group)
    found = (grouped - grouped.mean(1, keepdim=True)).reshape(-1)
    return torch.where(constant(rewards, group), 0.0, found)


def group_std(rewards: Tensor, group: int) -> Tensor:
    """Standard deviation of each picture's group (B,)."""
    return rewards.view(-1, group).std(1, correction=0).repeat_interleave(group)


def advantages(rewards: Tensor, group: int, std: Tensor) -> Tensor:
    """A = (r - group mean) / std (B,), clipped to +-5. `std` is the group's or the whole batch's (DGPO, TDM-R1)."""
    return (centred(rewards, group) / (std + MIN_STD)).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)


def binarised(values: Tensor, group: int) -> Tensor:
    """Only the side counts: +-1 per picture above or not above its group's mean, centred so that log Z cancels."""
    side = torch.where(centred(values, group) > 0, 1.0, -1.0).to(values.dtype)
    return torch.where(constant(values, group), 0.0, centred(side, group))


def group_weight(advantage: Tensor, error: Tensor, reference_error: Tensor, beta: float, group: int) -> Tensor:
    """W = sigmoid(beta / G sum_i A_i (d_i - d_ref_i)) (B,), one value a group, detached (DGPO; TDM-R1 eq. 9).

    The derivative of -log sigmoid(-beta / G sum A D) is W beta / G A: `beta` sharpens W and the caller drops it as a
    factor. 1/2 is undecided; towards 0 the group is already told apart as the rewards want it.
    """
    logits = (advantage * (error - reference_error)).detach().view(-1, group).mean(1)
    return torch.sigmoid(beta * logits).repeat_interleave(group)


def old_clip(advantage: Tensor, error: Tensor, old_error: Tensor, clip: float) -> Tensor:
    """True (B,) where exp(d_old - d) has left 1 +- clip on the wanted side: no further step (PPO; DGPO's code)."""
    ratio = (old_error - error).detach().exp()
    return torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)


def drift_clip(
    advantage: Tensor, error: Tensor, base_error: Tensor, drift: Tensor, threshold: float, group: int
) -> Tensor:
    """True (B,) where the group's drift from the base is over `threshold` and the picture has moved as wanted.

    `drift` (B,) is the mean squared distance of surrogate and base outputs. Official TDM-R1 takes the mean over the
    batch; over the group it does not depend on how groups are spread over processes.
    """
    far = drift.detach().view(-1, group).mean(1).repeat_interleave(group) > threshold
    moved = torch.where(advantage > 0, error < base_error, error > base_error).detach()
    return far & moved


def preference_loss(advantage: Tensor, weight: Tensor, error: Tensor, clipped: Tensor) -> Tensor:
    """(B,) W A d: gradient descent denoises what is above its group's mean better, the rest worse (DGPO, TDM-R1).

    A clipped picture keeps its value in the log and loses its gradient.
    """
    kept = torch.where(clipped, error.detach(), error)
    return weight.detach() * advantage.detach() * kept
