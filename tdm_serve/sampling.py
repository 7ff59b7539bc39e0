"""Few-step samplers as data: one row of coefficients per network evaluation.

A row says at which noise level the network is asked, and how the next latents follow from its prediction:

    x' = a * x + b * x0 + c * x0_prev + d * noise

x is the current latents, x0 the predicted clean latents, x0_prev the prediction of the step before. Rows are computed
once, in float64, by pure functions, so requests at different steps or with different samplers can share one forward
and one elementwise update. x = (1 - sigma) * clean + sigma * noise for flow matching; a variance-preserving process
has sqrt(1 - sigma^2) in place of 1 - sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tdm_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Row:
    """One step. `t` is the network's time, `sigma` in (0, 1] the share of noise; a, b, c, d as in the formula above."""

    t: float
    sigma: float
    a: float
    b: float
    c: float = 0.0
    d: float = 0.0


def shifted(u: float, shift: float) -> float:
    """Static timestep shift of SD3 and Z-Image: s * u / (1 + (s - 1) * u)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def sigma_grid(nfe: int, shift: float) -> tuple[float, ...]:
    """The noise levels of Z-Image's pipeline: linspace(1, 1 / nfe, nfe) under the shift, without the final 0."""
    if nfe < 1:
        raise ConfigError(f"nfe is {nfe}; a sampler needs at least one network evaluation")
    if shift <= 0:
        raise ConfigError(f"shift is {shift}; it must be positive")
    return tuple(shifted(1.0 - i / nfe, shift) for i in range(nfe))


def _euler(sigmas: Sequence[float]) -> list[Row]:
    """x' = x + (sigma' - sigma) * v with v = (x - x0) / sigma; equals DDIM for flow matching."""
    rows: list[Row] = []
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        a = following / sigma
        rows.append(Row(1000.0 * sigma, sigma, a, 1.0 - a))
    return rows


def _log_snr(clean: float, noise: float) -> float:
    """log(clean / noise) of the two shares; infinite at the clean end, minus infinite at pure noise."""
    if clean <= 0.0:
        return -math.inf
    return math.inf if noise <= 0.0 else math.log(clean / noise)


FEW_STEPS = 15  # below it diffusers' `lower_order_final` counts


def _second_order(rows: Sequence[Row], levels: Sequence[float]) -> list[Row]:
    """DPM-Solver++(2M) of first-order rows, the first step as it is (arXiv 2211.01095, algorithm 2).

    `levels` are the log signal-to-noise ratios at every boundary, one more than there are rows. The last step stays of
    first order where it leaves no noise and, as in diffusers, where there are fewer than 15.
    """
    corrected = list(rows)
    steady = len(rows) >= FEW_STEPS and math.isfinite(levels[-1])
    for i in range(1, len(rows) if steady else len(rows) - 1):
        correction = 0.5 * (levels[i + 1] - levels[i]) / (levels[i] - levels[i - 1])
        row = rows[i]  # the correction is 0 after a start from pure noise, whose step is infinite
        corrected[i] = replace(row, b=row.b * (1.0 + correction), c=-row.b * correction)
    return corrected


def _dpmpp_2m(sigmas: Sequence[float]) -> list[Row]:
    return _second_order(_euler(sigmas), [_log_snr(1.0 - sigma, sigma) for sigma in (*sigmas, 0.0)])


SAMPLERS: dict[str, Callable[[Sequence[float]], list[Row]]] = {"dpmpp_2m": _dpmpp_2m, "euler": _euler}


def rows_for(sampler: str, sigmas: Sequence[float], times: Sequence[float] = ()) -> tuple[Row, ...]:
    """The table of a sampler over strictly falling noise levels in (0, 1], without the final 0.

    `times` are the network's, where they are not 1000 * sigma.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    falling = all(x > y for x, y in pairwise(sigmas))
    if not sigmas or not falling or sigmas[0] > 1.0 or sigmas[-1] <= 0.0:
        raise ConfigError(f"sigmas are {list(sigmas)}; they must fall strictly, from at most 1, and stay above 0")
    if times and len(times) != len(sigmas):
        raise ConfigError(f"there are {len(times)} times and {len(sigmas)} sigmas; each step has one of both")
    rows = SAMPLERS[sampler](sigmas)
    return tuple(replace(row, t=time) for row, time in zip(rows, times, strict=True)) if times else tuple(rows)


def ddim(times: Sequence[float], alphas: Sequence[float]) -> tuple[Row, ...]:
    """Deterministic DDIM for a variance-preserving process (Song et al. 2021, eq. 12 with eta = 0).

    `times` are the network's times of the steps, `alphas` the cumulative products at every boundary: one more, and the
    last is 1 where no noise is left. A row's sigma is the noise share sqrt(1 - alpha), so the rows run in the same
    update as flow matching's.
    """
    if len(alphas) != len(times) + 1:
        raise ConfigError(f"{len(times)} times need {len(times) + 1} alphas, one per boundary; there are {len(alphas)}")
    rows: list[Row] = []
    for time, alpha, following in zip(times, alphas, alphas[1:], strict=False):
        keep = math.sqrt((1.0 - following) / (1.0 - alpha))
        rows.append(Row(time, math.sqrt(1.0 - alpha), keep, math.sqrt(following) - keep * math.sqrt(alpha)))
    return tuple(rows)


def diffusion_rows(sampler: str, times: Sequence[float], alphas: Sequence[float]) -> tuple[Row, ...]:
    """The table of "ddim" or "dpmpp_2m" for a variance-preserving process; arguments as `ddim` takes them."""
    if sampler not in DIFFUSION_SAMPLERS:
        raise ConfigError(
            f"sampler {sampler!r} is unknown for a variance-preserving process; choose one of "
            f"{', '.join(DIFFUSION_SAMPLERS)}"
        )
    rows = ddim(times, alphas)
    if sampler == "ddim":
        return rows
    return tuple(_second_order(rows, [_log_snr(math.sqrt(alpha), math.sqrt(1.0 - alpha)) for alpha in alphas]))


DIFFUSION_SAMPLERS = ("ddim", "dpmpp_2m")


def clean_shares(prediction: str, sigma: float) -> tuple[float, float]:
    """(p, q) of x0 = p * x + q * output: how the predicted clean latents follow from what the network returns.

    "flow": v = noise - clean on the straight path. "epsilon" and "v" (a * noise - s * clean) belong to a
    variance-preserving process with s = sigma.
    """
    if prediction == "flow":
        return 1.0, -sigma
    signal = math.sqrt(1.0 - sigma * sigma)
    if prediction == "epsilon":
        return 1.0 / signal, -sigma / signal
    if prediction == "v":
        return signal, -sigma
    raise ConfigError(f"prediction {prediction!r} is unknown; choose epsilon, flow or v")


def solver_grid(nfe: int, shift: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(sigmas, times) of diffusers' DPMSolverMultistepScheduler with `use_flow_sigmas`: SD3's TDM adapters.

    It starts just below pure noise, at 0.999 under the shift, and gives the network whole times, cut off.
    """
    if nfe < 1 or shift <= 0:
        raise ConfigError(f"nfe is {nfe} and shift {shift}; at least one evaluation and a positive shift are needed")
    sigmas = tuple(shifted(0.999 * (1.0 - i / nfe), shift) for i in range(nfe))
    return sigmas, tuple(float(int(1000.0 * sigma)) for sigma in sigmas)


def solver_times(nfe: int, steps: int = 1000) -> tuple[float, ...]:
    """The times of diffusers' DPMSolverMultistepScheduler for a process of `steps` betas, evenly from the last one."""
    if nfe < 1:
        raise ConfigError(f"nfe is {nfe}; a sampler needs at least one network evaluation")
    return tuple(float(round((steps - 1) * (nfe - i) / nfe)) for i in range(nfe))


def flow_match_grid(nfe: int, shift: float) -> tuple[float, ...]:
    """The sigmas of diffusers' FlowMatchEulerDiscreteScheduler left to itself, as SD3's pipeline leaves it.

    It shifts twice: its least sigma, one thousandth, when it is made, and the grid between 1 and that.
    """
    if nfe < 1 or shift <= 0:
        raise ConfigError(f"nfe is {nfe} and shift {shift}; at least one evaluation and a positive shift are needed")
    least = shifted(0.001, shift)
    return tuple(shifted(1.0 - (1.0 - least) * i / max(nfe - 1, 1), shift) for i in range(nfe))


def plan(sampler: str, nfe: int, shift: float) -> tuple[Row, ...]:
    """The table of a sampler with `nfe` evaluations on the shifted grid."""
    return rows_for(sampler, sigma_grid(nfe, shift))
