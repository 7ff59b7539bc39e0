"""A spec as the fields of a manifest: the inverse of `models.manifest.spec_of`, for folders that are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tdm_serve.models.spec import FORMAT, Adapter, ModelSpec

LIMITS = ("width", "height", "size_multiple", "min_side", "max_side", "max_prompt_tokens")


def described_base(spec: ModelSpec) -> dict[str, Any]:
    """What a manifest says of a spec's base: all but `versions` and `default`."""
    found: dict[str, Any] = {
        "format": FORMAT,
        "family": spec.family,
        "limits": {name: getattr(spec, name) for name in LIMITS},
        "prediction": spec.prediction,
    }
    if spec.betas is not None:
        found["betas"] = dataclasses.asdict(spec.betas)
    if spec.preview is not None:
        found["preview"] = {"matrix": spec.preview}
    return found


def described_version(spec: ModelSpec, keep: Callable[[Adapter], str]) -> dict[str, Any]:
    """What a manifest says of a spec's version. `keep` takes an adapter in, and gives its path in the new folder."""
    tables = [
        dataclasses.asdict(table) for table in spec.tables if (table.width, table.height) != (spec.width, spec.height)
    ]
    return {
        "description": spec.description,
        "adapter": [_described_adapter(adapter, keep(adapter)) for adapter in spec.adapters] or None,
        "sampler": spec.sampler,
        "shift": spec.shift,
        "sigmas": spec.sigmas,
        "times": spec.times,
        "grid": spec.grid,
        "guidance": spec.guidance,
        "free_steps": spec.free_steps,
        "tables": tables,
    }


def _described_adapter(adapter: Adapter, path: str) -> dict[str, Any]:
    """Only what differs from the defaults, beside the path."""
    plain = dataclasses.asdict(Adapter(adapter.path))
    return {"path": path} | {key: value for key, value in dataclasses.asdict(adapter).items() if value != plain[key]}
