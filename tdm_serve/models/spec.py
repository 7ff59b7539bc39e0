"""What a checkpoint says of itself: `tdm_serve.json` beside an ordinary diffusers folder.

One base, many versions: every version is the base alone or the base plus a LoRA, with the exact sigma table that it
was trained on. A folder without the file has no table, so nothing could be served on the right schedule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, cast

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.sampling import Row, rows_for, sigma_grid

MANIFEST = "tdm_serve.json"
FORMAT = 1

Colours = tuple[tuple[float, float, float], ...]


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

    def rows(self, steps: int | None = None) -> tuple[Row, ...]:
        """The trained table, or the same grid with another number of steps (untrained for a distilled version)."""
        if steps is None or steps == len(self.sigmas):
            return rows_for(self.sampler, self.sigmas)
        return rows_for(self.sampler, sigma_grid(steps, self.shift))


def read_spec(folder: Path, version: str | None, model_id: str) -> ModelSpec:
    """The spec of `version` (or the manifest's default) in a checkpoint folder."""
    manifest = _manifest(folder)
    try:
        versions = cast(Mapping[str, Mapping[str, Any]], manifest["versions"])
        name = version or str(manifest["default"])
        if name not in versions:
            raise CheckpointError(f"{folder} has no version {name!r}; it has {', '.join(sorted(versions))}")
        chosen, limits = versions[name], cast(Mapping[str, int], manifest["limits"])
        spec = ModelSpec(
            id=model_id,
            family=str(manifest["family"]),
            base=folder,
            version=name,
            adapters=_adapters(chosen, folder),
            sampler=str(chosen["sampler"]),
            shift=float(chosen["shift"]),
            sigmas=tuple(float(s) for s in chosen["sigmas"]),
            guidance=float(chosen["guidance"]),
            width=int(limits["width"]),
            height=int(limits["height"]),
            size_multiple=int(limits["size_multiple"]),
            min_side=int(limits["min_side"]),
            max_side=int(limits["max_side"]),
            max_prompt_tokens=int(limits["max_prompt_tokens"]),
            description=str(chosen.get("description", "")),
            preview=_preview_matrix(manifest),
        )
        spec.rows()
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not usable: {error!r}") from error
    return spec


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
