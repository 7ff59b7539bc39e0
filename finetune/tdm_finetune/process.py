"""How clean latents and noise mix along a noise level, and what the network predicts there: one interface for both.

x = a(level) * clean + s(level) * noise. `Flow` is flow matching (SD3, Z-Image), whose level is sigma in [0, 1];
`Diffusion` is the variance-preserving process (SD1.5, PixArt), whose level is the number of noising steps, 0 .. 1000,
so that 0 is clean and level t + 1 is the network's time t. Losses and trainers speak to a `Process` only. All levels
are float tensors (B,), all arithmetic is float32: x0 from epsilon divides by a, which is 0.017 at level 900.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from tdm_serve.errors import ConfigError
from tdm_serve.sampling import Row, ddim, plan

GAP = 0.02  # of unshifted time: the least distance between a boundary and the level that it is noised to
MIN_SPREAD = 1e-8


def per_picture(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


class Process(Protocol):
    """One forward process with one kind of network output."""

    def signal(self, level: Tensor) -> Tensor:
        """a (B,): the share of the clean latents."""
        ...

    def spread(self, level: Tensor) -> Tensor:
        """s (B,): the share of the noise."""
        ...

    def clean(self, x: Tensor, level: Tensor, output: Tensor) -> Tensor:
        """Predicted clean latents from the network's `output` at `x`."""
        ...

    def target(self, x: Tensor, level: Tensor, clean: Tensor) -> Tensor:
        """The output at `x` that predicts `clean`: the inverse of `clean`."""
        ...

    def score_target(self, start: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        """The output of exact denoising score matching at `high` when `start` at `low` is the data (notes, 1.1)."""
        ...

    def draw(self, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
        """Levels between `low` + gap and `high` - gap / 2, at the share `u` (B,) in [0, 1) of the process's time."""
        ...

    def level_at(self, time: float) -> float:
        """The level at `time` in [0, 1] of the process's own, unshifted clock."""
        ...

    def rows(self, nfe: int) -> tuple[Row, ...]:
        """The deterministic K-step sampler, as serving runs it."""
        ...

    def levels(self, nfe: int) -> tuple[float, ...]:
        """The K + 1 boundaries of that sampler, from noise to clean."""
        ...


def bridge_coefficients(process: Process, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(r, b) of the transition from level `low` up to `high`: r = a_high / a_low, b^2 = s_high^2 - (r s_low)^2."""
    r = process.signal(high) / process.signal(low)
    b = (process.spread(high).square() - (r * process.spread(low)).square()).clamp_min(MIN_SPREAD).sqrt()
    return r, b


def bridge(process: Process, start: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
    """Noises `start` from level `low` up to `high`: x = r x_low + b n (TDM, sub-interval noising)."""
    r, b = bridge_coefficients(process, low, high)
    return per_picture(r) * start + per_picture(b) * noise


def noise_of(process: Process, x: Tensor, level: Tensor, clean: Tensor) -> Tensor:
    """The noise that `x` holds if its clean latents are `clean`."""
    return (x - per_picture(process.signal(level)) * clean) / per_picture(process.spread(level))


class Flow:
    """Flow matching: a = 1 - sigma, s = sigma, the network predicts v = noise - clean. `shift` bends its clock."""

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ConfigError(f"shift is {shift}; it must be above 0")
        self.shift = shift

    def signal(self, level: Tensor) -> Tensor:
        return 1 - level

    def spread(self, level: Tensor) -> Tensor:
        return level

    def clean(self, x: Tensor, level: Tensor, output: Tensor) -> Tensor:
        return x - per_picture(level) * output

    def target(self, x: Tensor, level: Tensor, clean: Tensor) -> Tensor:
        return (x - clean) / per_picture(level)

    def score_target(self, start: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        """v = -x_u / (1 - u) + (n / b) (sigma + u^2 r / (1 - u)), the bridge's derivative; finite at sigma = 1."""
        r, b = bridge_coefficients(self, low, high)
        pull = (high + low.square() * r / (1 - low)) / b
        return per_picture(pull) * noise - start / per_picture(1 - low)

    def draw(self, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
        bottom, top = self._time(low) + GAP, self._time(high) - GAP / 2
        return self.shifted(bottom + (top - bottom).clamp_min(0) * u)

    def level_at(self, time: float) -> float:
        return float(self.shifted(torch.tensor(time, dtype=torch.float64)))

    def rows(self, nfe: int) -> tuple[Row, ...]:
        return plan("euler", nfe, self.shift)

    def levels(self, nfe: int) -> tuple[float, ...]:
        return (*(row.sigma for row in self.rows(nfe)), 0.0)

    def shifted(self, u: Tensor) -> Tensor:
        """The shifted level at unshifted time `u`: s u / (1 + (s - 1) u)."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _time(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift - (self.shift - 1) * sigma)


class Diffusion:
    """Variance-preserving diffusion over a table of cumulative alphas; predicts epsilon, or v = a noise - s clean.

    `alphas` are the scheduler's cumulative products, one per network time. `top` is where sampling starts: below the
    last level, since x0 divides by a (TDM starts PixArt at 900 of 1000).
    """

    def __init__(
        self, alphas: Sequence[float], *, prediction: Literal["epsilon", "v"] = "epsilon", top: int | None = None
    ) -> None:
        self.top = len(alphas) if top is None else top
        if not 1 <= self.top <= len(alphas):
            raise ConfigError(f"top is {self.top}; it must be between 1 and the table's {len(alphas)} levels")
        self.prediction = prediction
        self.table = torch.tensor([1.0, *alphas], dtype=torch.float64)
        self._tables = {self.table.device: self.table}

    def signal(self, level: Tensor) -> Tensor:
        return self._alpha(level).sqrt().to(level.dtype)

    def spread(self, level: Tensor) -> Tensor:
        return (1 - self._alpha(level)).sqrt().to(level.dtype)

    def _alpha(self, level: Tensor) -> Tensor:
        """From a copy of the table on the level's device."""
        if level.device not in self._tables:
            self._tables[level.device] = self.table.to(level.device)
        return self._tables[level.device][level.long()]

    def clean(self, x: Tensor, level: Tensor, output: Tensor) -> Tensor:
        a, s = per_picture(self.signal(level)), per_picture(self.spread(level))
        return (x - s * output) / a if self.prediction == "epsilon" else a * x - s * output

    def target(self, x: Tensor, level: Tensor, clean: Tensor) -> Tensor:
        a, s = per_picture(self.signal(level)), per_picture(self.spread(level))
        noise = noise_of(self, x, level, clean)
        return noise if self.prediction == "epsilon" else a * noise - s * clean

    def score_target(self, start: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        """epsilon = s n / b; as v = (s a / (b a_u^2)) n - (s / a_u) x_u, which is finite where a is small."""
        _, b = bridge_coefficients(self, low, high)
        a, s, a_low = self.signal(high), self.spread(high), self.signal(low)
        if self.prediction == "epsilon":
            return per_picture(s / b) * noise
        return per_picture(s * a / (b * a_low.square())) * noise - per_picture(s / a_low) * start

    def draw(self, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
        gap = GAP * self.top
        bottom, top = low + gap, high - gap / 2
        return (bottom + (top - bottom).clamp_min(0) * u).round().clamp(1, self.top)

    def level_at(self, time: float) -> float:
        return float(round(time * self.top))

    def rows(self, nfe: int) -> tuple[Row, ...]:
        alphas = [float(self.table[int(level)]) for level in self.levels(nfe)]
        return ddim([level - 1.0 for level in self.levels(nfe)[:-1]], alphas)

    def levels(self, nfe: int) -> tuple[float, ...]:
        if not 1 <= nfe <= self.top:
            raise ConfigError(f"nfe is {nfe}; it must be between 1 and {self.top}")
        return tuple(float(self.top * i // nfe) for i in range(nfe, -1, -1))
