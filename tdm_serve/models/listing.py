"""The catalogue as people see it: one line a model, with what is at hand on this machine. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tdm_serve.errors import UnknownModel
from tdm_serve.models.catalog import evaluations
from tdm_serve.models.entries import EMBEDDED, Entry, catalogue
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.sources import at_hand, wanted
from tdm_serve.models.spec import MANIFEST, ModelSpec


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be asked for by name, as `tdm-serve models` shows it."""

    id: str
    family: str
    description: str
    nfe: int
    guidance: float  # the weight inside; 1 is off
    schedule: str
    sizes: str
    base: str
    adapters: tuple[str, ...]
    state: Literal["embedded", "downloaded", "needs download"]
    gated: bool
    licence: str
    verified: tuple[str, ...]
    notes: tuple[str, ...]


def entries() -> list[CatalogEntry]:
    """The catalogue, with the number of evaluations of each model's own table; nothing is downloaded."""
    return [_shown(entry) for entry in catalogue().values() if _is_present(entry)]


def _shown(entry: Entry) -> CatalogEntry:
    if entry.base is None:
        spec, base, state = read_spec(EMBEDDED, entry.embedded or None, entry.id), "in the package", "embedded"
        adapters = tuple(one.path.name for one in spec.adapters)
    else:
        adapters = tuple(f"{one.hub}/{one.file}" for one in entry.adapters)
        spec, base = entry.spec(Path()), str(entry.base)
        state = "downloaded" if _is_downloaded(entry) else "needs download"
    return CatalogEntry(
        id=entry.id,
        family=spec.family,
        description=spec.description,
        nfe=evaluations(spec.sigmas, spec.guidance),
        guidance=spec.guidance,
        schedule=_schedule(spec),
        sizes=f"{spec.width}x{spec.height}; sides from {spec.min_side} to {spec.max_side} by {spec.size_multiple}",
        base=base,
        adapters=adapters,
        state=state,
        gated=entry.gated,
        licence=entry.licence,
        verified=entry.verified,
        notes=entry.notes,
    )


def _schedule(spec: ModelSpec) -> str:
    """Sampler and levels in words; of several sizes each."""
    if spec.betas is not None:
        return f"{spec.sampler}, times {_few(spec.times)}"
    sizes = [f" at {one.width}x{one.height}" for one in spec.tables] or [""]
    tables = spec.tables or (spec,)
    levels = (f"sigmas {_few(table.sigmas)}{size}" for table, size in zip(tables, sizes, strict=True))
    return f"{spec.sampler}, {'; '.join(levels)}"


def _few(values: tuple[float, ...]) -> str:
    """A list that is short enough to read."""
    shown = [f"{value:.4g}" for value in values]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])


def find(name: str, among: Sequence[CatalogEntry]) -> CatalogEntry:
    """The entry of that id. Raises UnknownModel."""
    for entry in among:
        if entry.id == name:
            return entry
    raise UnknownModel(f"model {name!r} is not in the catalogue; it has {', '.join(entry.id for entry in among)}")


def _is_downloaded(entry: Entry) -> bool:
    assert entry.base is not None
    adapters = (at_hand(one.hub, [one.file]) for one in entry.adapters)
    return at_hand(entry.base, wanted(str(entry.fields["family"]))) is not None and all(adapters)


def _is_present(entry: Entry) -> bool:
    """A checkpoint folder may hold fewer versions than the catalogue names, as a freshly trained one does."""
    if not entry.embedded:
        return True
    return entry.embedded in json.loads((EMBEDDED / MANIFEST).read_text())["versions"]
