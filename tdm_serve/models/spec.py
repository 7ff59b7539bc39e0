"""One version of one checkpoint: what to load, and the exact tables it was trained on.

It comes from a checkpoint's manifest (`models.manifest`), from the catalogue, or from a stock schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import log, sqrt
from operator import mul
from pathlib import Path

from tdm_serve.errors import ConfigError
from tdm_serve.sampling import Row, clean_shares, diffusion_rows, flow_match_grid, rows_for, sigma_grid, solver_grid

MANIFEST = "tdm_serve.json"
FORMAT = 1

Colours = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Betas:
    """The variance-preserving process of a base: how much noise each of its `steps` adds.

    `schedule` is diffusers' name: "linear" in beta, or "scaled_linear", which is linear in its square root. `final` is
    what the last step leaves: "zero" noise, or "sigma_min", the noise of time 0, as schedulers leave it whose
    configuration says `set_alpha_to_one: false` or `final_sigmas_type: sigma_min`.
    """

    start: float
    end: float
    schedule: str = "linear"
    steps: int = 1000
    final: str = "zero"

    def alphas(self) -> tuple[float, ...]:
        """The cumulative products of 1 - beta, one per network time."""
        if self.schedule not in ("linear", "scaled_linear"):
            raise ConfigError(f"beta schedule {self.schedule!r} is unknown; choose linear or scaled_linear")
        if self.final not in ("zero", "sigma_min"):
            raise ConfigError(f"final is {self.final!r}; what the last step leaves is zero or sigma_min")
        power = 2 if self.schedule == "scaled_linear" else 1
        first, last = self.start ** (1 / power), self.end ** (1 / power)
        step = (last - first) / (self.steps - 1)
        return tuple(accumulate((1.0 - (first + i * step) ** power for i in range(self.steps)), mul))

    def sigmas(self, times: Sequence[float]) -> tuple[float, ...]:
        """The share of noise at each of the network's times, of which there are `steps` from 0."""
        alphas = self.alphas()
        if not times or not all(0 <= time < self.steps and time == int(time) for time in times):
            raise ConfigError(f"times are {list(times)}; a process with betas needs whole ones below {self.steps}")
        return tuple(sqrt(1.0 - alphas[int(time)]) for time in times)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of a version: where it is, how strong, and what its file may not say of itself (None)."""

    path: Path
    scale: float = 1.0
    format: str = "auto"
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """The schedule of one picture size, in pixels, where a version was trained on more than one."""

    width: int
    height: int
    shift: float
    sigmas: tuple[float, ...]
    times: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One version of one checkpoint, resolved: what to load and how to sample."""

    id: str
    family: str
    base: Path
    version: str
    adapters: tuple[Adapter, ...]
    sampler: str
    shift: float
    sigmas: tuple[float, ...]
    guidance: float
    width: int
    height: int
    size_multiple: int
    min_side: int
    max_side: int
    max_prompt_tokens: int
    description: str
    preview: Colours | None = None  # latents to colours, the matrix of tdm_serve.preview
    sizes: tuple[tuple[int, int], ...] = ()  # the only ones, of an exported engine; () is any within the limits

    prediction: str = "flow"  # what the network returns: "flow" (noise - clean), "epsilon" or "v"
    betas: Betas | None = None  # of a variance-preserving process; None is flow matching
    times: tuple[float, ...] = ()  # the network's times; empty is 1000 * sigma, and a process with betas needs them
    grid: str = "linear"  # of other step counts: "linear" (Z-Image), "solver" (DPM-Solver's), "flow_match" (stock SD3)
    free_steps: bool = False  # a multi-step base, which takes any step count; a few-step version is tied to its table
    tables: tuple[Table, ...] = ()  # of the sizes with a schedule of their own, as many steps each; see `at`

    def rows(self, steps: int | None = None, width: int | None = None, height: int | None = None) -> tuple[Row, ...]:
        """The trained table for a size, or the same grid with another number of steps (untrained unless `free_steps`).

        Without a size it is the one of the version's own size.
        """
        if width is not None and height is not None and self.tables:
            return self.at(width, height).rows(steps)
        if self.betas is not None:
            return self._diffusion_rows(self.betas, steps or len(self.times))
        if steps is None or steps == len(self.sigmas):
            return rows_for(self.sampler, self.sigmas, self.times)
        if self.grid == "solver":
            return rows_for(self.sampler, *solver_grid(steps, self.shift))
        if self.grid == "flow_match":
            return rows_for(self.sampler, flow_match_grid(steps, self.shift))
        return rows_for(self.sampler, sigma_grid(steps, self.shift))

    def at(self, width: int, height: int) -> ModelSpec:
        """This version with the table for a size: of the trained sizes the one whose area is nearest, as a ratio.

        So no size is sampled on a schedule that nothing was trained on. 1152x896 takes the table of 1024x1024.
        """
        if not self.tables:
            return self
        area = width * height
        table = min(self.tables, key=lambda one: abs(log(area / (one.width * one.height))))
        return replace(self, shift=table.shift, sigmas=table.sigmas, times=table.times, tables=())

    def _diffusion_rows(self, betas: Betas, steps: int) -> tuple[Row, ...]:
        times, alphas = self.times, betas.alphas()
        if steps != len(times):  # evenly from the same start
            times = tuple(float(round(times[0] * (steps - i) / steps)) for i in range(steps))
        last = alphas[0] if betas.final == "sigma_min" else 1.0
        return diffusion_rows(self.sampler, times, [*(alphas[int(time)] for time in times), last])

    def clean_shares(self, sigma: float) -> tuple[float, float]:
        """(p, q) of x0 = p * x + q * output at a noise level."""
        return clean_shares(self.prediction, sigma)
