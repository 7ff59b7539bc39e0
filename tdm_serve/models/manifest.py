"""What a checkpoint says of itself: `tdm_serve.json` beside an ordinary diffusers folder.

One base, many versions: every version is the base alone or the base plus a LoRA, with the exact sigma table that it
was trained on, or one table for each of several sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, cast

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.spec import FORMAT, MANIFEST, Adapter, Betas, Colours, ModelSpec, Table
from tdm_serve.sampling import flow_match_grid, sigma_grid, solver_grid, solver_times


def read_spec(folder: Path, version: str | None, model_id: str) -> ModelSpec:
    """The spec of `version` (or the manifest's default) in a checkpoint folder."""
    manifest = _manifest(folder)
    try:
        versions = cast(Mapping[str, Mapping[str, Any]], manifest["versions"])
        name = version or str(manifest["default"])
        if name not in versions:
            raise CheckpointError(f"{folder} has no version {name!r}; it has {', '.join(sorted(versions))}")
        chosen = versions[name]
        return spec_of({**manifest, **chosen}, folder, model_id, name, _adapters(chosen, folder))
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not usable: {error!r}") from error


def spec_of(
    found: Mapping[str, Any], folder: Path, model_id: str, version: str, adapters: tuple[Adapter, ...]
) -> ModelSpec:
    """The spec that one version's fields describe, those of its checkpoint among them. Raises what bad fields do."""
    limits, betas = cast(Mapping[str, int], found["limits"]), _betas(found.get("betas"))
    grid, width, height = str(found.get("grid", "linear")), int(limits["width"]), int(limits["height"])
    own = _table(found, grid, betas, width, height)
    tables = tuple(_table(one, grid, betas, int(one["width"]), int(one["height"])) for one in found.get("tables", ()))
    if any(len(one.sigmas) != len(own.sigmas) for one in tables):
        raise ValueError(f"tables hold other numbers of steps than the version's own {len(own.sigmas)}")
    spec = ModelSpec(
        id=model_id,
        family=str(found["family"]),
        base=folder,
        version=version,
        adapters=adapters,
        sampler=str(found["sampler"]),
        shift=own.shift,
        sigmas=own.sigmas,
        guidance=float(found["guidance"]),
        width=width,
        height=height,
        size_multiple=int(limits["size_multiple"]),
        min_side=int(limits["min_side"]),
        max_side=int(limits["max_side"]),
        max_prompt_tokens=int(limits["max_prompt_tokens"]),
        description=str(found.get("description", "")),
        preview=_preview_matrix(found),
        prediction=str(found.get("prediction", "flow")),
        betas=betas,
        times=own.times,
        grid=grid,
        free_steps=_free_steps(found),
        tables=(own, *tables) if tables else (),
    )
    for table in (own, *tables):
        for row in spec.rows(None, table.width, table.height):
            spec.clean_shares(row.sigma)
    return spec


def _table(found: Mapping[str, Any], grid: str, betas: Betas | None, width: int, height: int) -> Table:
    """A size's schedule: its `sigmas`, its `times` where there are betas, or `steps` on the grid under `shift`."""
    times, shift = tuple(float(time) for time in found.get("times", ())), float(found.get("shift", 1.0))
    steps = int(found.get("steps", 0))
    if betas:
        times = times or solver_times(steps, betas.steps)
        return Table(width, height, shift, betas.sigmas(times), times)
    if "sigmas" in found:
        return Table(width, height, shift, tuple(float(sigma) for sigma in found["sigmas"]), times)
    if grid == "solver":
        return Table(width, height, shift, *solver_grid(steps, shift))
    make = flow_match_grid if grid == "flow_match" else sigma_grid
    return Table(width, height, shift, make(steps, shift))


def _free_steps(version: Mapping[str, Any]) -> bool:
    """`free_steps`; older manifests do not say it, and of theirs a guided version without adapter is a multi-step base.

    Distilled versions have an adapter or, fused, no guidance.
    """
    found = version.get("free_steps", not version.get("adapter") and float(version["guidance"]) != 1.0)
    if not isinstance(found, bool):
        raise ValueError(f"free_steps is {found!r}; it must be true or false")
    return found


def _betas(found: Mapping[str, Any] | None) -> Betas | None:
    if found is None:
        return None
    start, end = float(found["start"]), float(found["end"])
    schedule, final = str(found.get("schedule", "linear")), str(found.get("final", "zero"))
    betas = Betas(start, end, schedule, int(found.get("steps", 1000)), final)
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
