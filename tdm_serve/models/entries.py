"""The catalogue: named models as data (`catalog.toml`), read and checked. Nothing is downloaded or loaded here."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from tdm_serve.models.manifest import spec_of
from tdm_serve.models.sources import Hub
from tdm_serve.models.spec import Adapter, ModelSpec

CATALOGUE = Path(__file__).with_name("catalog.toml")
EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints" / "scenes"

_ABOUT = {"base", "revision", "gated", "licence", "verified", "notes", "adapters"}
_SCHEDULE = {"sampler", "grid", "shift", "sigmas", "times", "steps", "tables", "guidance", "free_steps"}
_FIELDS = _ABOUT | _SCHEDULE | {"description", "family", "prediction", "betas", "limits"}
_ADAPTER_FIELDS = {"repo", "revision", "file", "format", "rank", "alpha", "scale", "targets", "tensors"}


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter's file on the hub, a name or a pattern that one file matches, and what the file may not say itself."""

    hub: Hub
    file: str
    stated: Adapter  # its path is empty
    tensors: int | None  # in an unnamed list

    def at(self, path: Path) -> Adapter:
        """The adapter as it lies on this machine.

        A safetensors file says its own format, rank and alpha, as `tdm-serve convert` writes them.
        """
        said = self.stated
        if path.suffix == ".safetensors":
            return Adapter(path, said.scale)
        return Adapter(path, said.scale, "auto", said.rank, said.alpha, said.targets)


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the catalogue. `fields` are those of a manifest; an embedded one has them in its own manifest."""

    id: str
    base: Hub | None  # None is the checkpoint inside the package
    embedded: str | None  # its version there
    adapters: tuple[PublishedAdapter, ...]
    gated: bool
    licence: str
    verified: tuple[str, ...]
    notes: tuple[str, ...]
    fields: Mapping[str, Any]

    def spec(self, folder: Path, adapters: Sequence[Adapter] = ()) -> ModelSpec:
        """This model on a base folder and adapters that are at hand."""
        return spec_of(self.fields, folder, self.id, self.id, tuple(adapters))


@cache
def catalogue() -> Mapping[str, Entry]:
    """Every entry by its id."""
    return read_catalogue(CATALOGUE)


def read_catalogue(path: Path) -> dict[str, Entry]:
    """The entries of a catalogue file. Raises ValueError for a key that is not known: the file is part of a package."""
    models = cast(Mapping[str, Mapping[str, Any]], tomllib.loads(path.read_text())["models"])
    return {name: _entry(name, found) for name, found in models.items()}


@cache
def stock_defaults() -> Mapping[str, Mapping[str, Any]]:
    """By family, the steps, guidance and limits of a folder that says no more of itself than its stock scheduler."""
    return tomllib.loads(CATALOGUE.read_text())["stock"]


def _entry(name: str, found: Mapping[str, Any]) -> Entry:
    embedded = found.get("embedded")
    _check_keys(name, found, _FIELDS if embedded is None else {"embedded", "licence", "verified"})
    return Entry(
        id=name,
        base=None if embedded is not None else _hub(found["base"], found["revision"]),
        embedded=embedded,
        adapters=tuple(_adapter(name, one) for one in found.get("adapters", ())),
        gated=bool(found.get("gated", False)),
        licence=str(found["licence"]),
        verified=tuple(found["verified"]),
        notes=tuple(found.get("notes", ())),
        fields={"free_steps": False} | {key: value for key, value in found.items() if key not in _ABOUT},
    )


def _adapter(name: str, found: Mapping[str, Any]) -> PublishedAdapter:
    _check_keys(f"{name}: adapters", found, _ADAPTER_FIELDS)
    stated = Adapter(
        Path(),
        float(found["scale"]),
        str(found["format"]),
        found.get("rank"),
        found.get("alpha"),
        tuple(found.get("targets", ())),
    )
    return PublishedAdapter(_hub(found["repo"], found["revision"]), str(found["file"]), stated, found.get("tensors"))


def _hub(repo: str, revision: str) -> Hub:
    return Hub(repo, revision or None)


def _check_keys(where: str, found: Mapping[str, Any], known: set[str]) -> None:
    if odd := sorted(set(found) - known):
        raise ValueError(f"the catalogue's entry {where} has {', '.join(odd)}; known are {', '.join(sorted(known))}")
