"""What a checkpoint says of itself: `tdm_serve.json` beside an ordinary diffusers folder.

One base, many versions: every version is the base alone or the base plus a LoRA, with the exact sigma table that it
was trained on. A folder without the file has no table, so nothing could be served on the right schedule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite, sqrt
from operator import mul
from pathlib import Path
from typing import Any, cast

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.sampling import Row, clean_shares, diffusion_rows, rows_for, sigma_grid, solver_grid

MANIFEST = "tdm_serve.json"
FORMAT = 1

Colours = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Betas:
    """The variance-preserving process of a base: how much noise each of its `steps` adds.

    `schedule` is diffusers' name: "linear" in beta, or "scaled_linear", which is linear in its square root.
    """

    start: float
    end: float
    schedule: str = "linear"
    steps: int = 1000

    def alphas(self) -> tuple[float, ...]:
        """The cumulative products of 1 - beta, one per network time."""
        if self.schedule not in ("linear", "scaled_linear"):
            raise ConfigError(f"beta schedule {self.schedule!r} is unknown; choose linear or scaled_linear")
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

    prediction: str = "flow"  # what the network returns: "flow" (noise - clean), "epsilon" or "v"
    betas: Betas | None = None  # of a variance-preserving process; None is flow matching
    times: tuple[float, ...] = ()  # the network's times; empty is 1000 * sigma, and a process with betas needs them
    grid: str = "linear"  # of untrained step counts: "linear" as Z-Image's pipeline, "solver" as DPM-Solver's flow

    def rows(self, steps: int | None = None) -> tuple[Row, ...]:
        """The trained table, or the same grid with another number of steps (untrained for a distilled version)."""
        if self.betas is not None:
            return self._diffusion_rows(self.betas, steps or len(self.times))
        if steps is None or steps == len(self.sigmas):
            return rows_for(self.sampler, self.sigmas, self.times)
        if self.grid == "solver":
            return rows_for(self.sampler, *solver_grid(steps, self.shift))
        return rows_for(self.sampler, sigma_grid(steps, self.shift))

    def _diffusion_rows(self, betas: Betas, steps: int) -> tuple[Row, ...]:
        times, alphas = self.times, betas.alphas()
        if steps != len(times):  # evenly from the same start
            times = tuple(float(round(times[0] * (steps - i) / steps)) for i in range(steps))
        return diffusion_rows(self.sampler, times, [*(alphas[int(time)] for time in times), 1.0])

    def clean_shares(self, sigma: float) -> tuple[float, float]:
        """(p, q) of x0 = p * x + q * output at a noise level."""
        return clean_shares(self.prediction, sigma)


def read_spec(folder: Path, version: str | None, model_id: str) -> ModelSpec:
    """The spec of `version` (or the manifest's default) in a checkpoint folder."""
    manifest = _manifest(folder)
    try:
        versions = cast(Mapping[str, Mapping[str, Any]], manifest["versions"])
        name = version or str(manifest["default"])
        if name not in versions:
            raise CheckpointError(f"{folder} has no version {name!r}; it has {', '.join(sorted(versions))}")
        chosen, limits = versions[name], cast(Mapping[str, int], manifest["limits"])
        betas, times = _betas(manifest.get("betas")), tuple(float(t) for t in chosen.get("times", ()))
        spec = ModelSpec(
            id=model_id,
            family=str(manifest["family"]),
            base=folder,
            version=name,
            adapters=_adapters(chosen, folder),
            sampler=str(chosen["sampler"]),
            shift=float(chosen["shift"]),
            sigmas=betas.sigmas(times) if betas else tuple(float(s) for s in chosen["sigmas"]),
            guidance=float(chosen["guidance"]),
            width=int(limits["width"]),
            height=int(limits["height"]),
            size_multiple=int(limits["size_multiple"]),
            min_side=int(limits["min_side"]),
            max_side=int(limits["max_side"]),
            max_prompt_tokens=int(limits["max_prompt_tokens"]),
            description=str(chosen.get("description", "")),
            preview=_preview_matrix(manifest),
            prediction=str(manifest.get("prediction", "flow")),
            betas=betas,
            times=times,
            grid=str(chosen.get("grid", "linear")),
        )
        for row in spec.rows():
            spec.clean_shares(row.sigma)
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not usable: {error!r}") from error
    return spec


def _betas(found: Mapping[str, Any] | None) -> Betas | None:
    if found is None:
        return None
    start, end = float(found["start"]), float(found["end"])
    betas = Betas(start, end, str(found.get("schedule", "linear")), int(found.get("steps", 1000)))
    betas.alphas()
    return betas


def _adapters(version: Mapping[str, Any], folder: Path) -> tuple[Adapter, ...]:
    """`adapter`: nothing, a file's name, a table of `Adapter`'s fields, or a list of such."""
    found = version.get("adapter") or []
    entries = cast(list[Any], found if isinstance(found, list) else [found])
    return tuple(_adapter({"path": entry} if isinstance(entry, str) else entry, folder) for entry in entries)


def _adapter(entry: Mapping[str, Any], folder: Path) -> Adapter:
    odd = sorted(set(entry) - {"path", "scale", "format", "rank", "alpha", "targets"})
    scale = float(entry.get("scale", 1.0))
    if odd or not isfinite(scale):
        raise ValueError(f"an adapter has {odd or scale}; it takes path, a finite scale, format, rank, alpha, targets")
    rank, alpha = entry.get("rank"), entry.get("alpha")
    return Adapter(
        folder / str(entry["path"]),
        scale,
        str(entry.get("format", "auto")),
        None if rank is None else int(rank),
        None if alpha is None else float(alpha),
        tuple(str(target) for target in entry.get("targets", ())),
    )


def _preview_matrix(manifest: Mapping[str, Any]) -> Colours | None:
    """`preview.matrix`: rows of three numbers, one a latent channel and one for the offset."""
    preview = cast(Mapping[str, Any], manifest.get("preview") or {})
    rows = cast(list[list[float]], preview.get("matrix") or [])
    matrix = tuple((float(r), float(g), float(b)) for r, g, b in rows)
    if not all(isfinite(value) for row in matrix for value in row):
        raise ValueError("preview.matrix holds values that are no numbers")
    return matrix or None


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}, so its sigma table is unknown; a checkpoint is a diffusers folder with "
            "that file beside model_index.json"
        )
    try:
        manifest = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(manifest, dict) or cast(dict[str, Any], manifest).get("format") != FORMAT:
        raise CheckpointError(f"{path} does not declare format {FORMAT}")
    found = cast(dict[str, Any], manifest)
    missing = [key for key in ("family", "versions", "default", "limits") if key not in found]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return found
