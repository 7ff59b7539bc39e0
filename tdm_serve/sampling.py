"""Few-step samplers as data: one row of coefficients per network evaluation.

A row says at which noise level the network is asked, and how the next latents follow from its prediction:

    x' = a * x + b * x0 + c * x0_prev + d * noise

x is the current latents, x0 the predicted clean latents, x0_prev the prediction of the step before. Rows are computed
once, in float64, by pure functions, so requests at different steps or with different samplers can share one forward
and one elementwise update. Flow matching throughout: x = (1 - sigma) * clean + sigma * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tdm_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Row:
    """One step. `t` is the model's time (1000 * sigma), `sigma` in (0, 1]; a, b, c, d as in the module's formula."""

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


def _log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma); infinite at the clean end, minus infinite at pure noise."""
    if sigma >= 1.0:
        return -math.inf
    return math.inf if sigma <= 0.0 else math.log((1.0 - sigma) / sigma)


def _dpmpp_2m(sigmas: Sequence[float]) -> list[Row]:
    """DPM-Solver++(2M) for flow matching, first and last step of first order (arXiv 2211.01095, algorithm 2)."""
    rows = _euler(sigmas)
    levels = [*sigmas, 0.0]
    for i in range(1, len(sigmas) - 1):
        step = _log_snr(levels[i + 1]) - _log_snr(levels[i])
        before = _log_snr(levels[i]) - _log_snr(levels[i - 1])
        correction = 0.5 * step / before  # 0 after a start from pure noise, whose step is infinite
        row = rows[i]
        rows[i] = Row(row.t, row.sigma, row.a, row.b * (1.0 + correction), -row.b * correction)
    return rows


SAMPLERS: dict[str, Callable[[Sequence[float]], list[Row]]] = {"dpmpp_2m": _dpmpp_2m, "euler": _euler}


def rows_for(sampler: str, sigmas: Sequence[float]) -> tuple[Row, ...]:
    """The table of a sampler over strictly falling noise levels in (0, 1], without the final 0."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    falling = all(x > y for x, y in pairwise(sigmas))
    if not sigmas or not falling or sigmas[0] > 1.0 or sigmas[-1] <= 0.0:
        raise ConfigError(f"sigmas are {list(sigmas)}; they must fall strictly, from at most 1, and stay above 0")
    return tuple(SAMPLERS[sampler](sigmas))


def ddim(times: Sequence[float], alphas: Sequence[float]) -> tuple[Row, ...]:
    """Deterministic DDIM for a variance-preserving process (Song et al. 2021, eq. 12 with eta = 0).

    `times` are the network's times of the steps, `alphas` the cumulative products at every boundary: one more, and the
    last is 1. A row's sigma is the noise share sqrt(1 - alpha), so the rows run in the same update as flow matching's.
    """
    if len(alphas) != len(times) + 1:
        raise ConfigError(f"{len(times)} times need {len(times) + 1} alphas, one per boundary; there are {len(alphas)}")
    rows: list[Row] = []
    for time, alpha, following in zip(times, alphas, alphas[1:], strict=False):
        keep = math.sqrt((1.0 - following) / (1.0 - alpha))
        rows.append(Row(time, math.sqrt(1.0 - alpha), keep, math.sqrt(following) - keep * math.sqrt(alpha)))
    return tuple(rows)


def plan(sampler: str, nfe: int, shift: float) -> tuple[Row, ...]:
    """The table of a sampler with `nfe` evaluations on the shifted grid."""
    return rows_for(sampler, sigma_grid(nfe, shift))
