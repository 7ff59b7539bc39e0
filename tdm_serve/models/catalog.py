"""Named models as data, and how a name or a path becomes a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tdm_serve.errors import UnknownModel
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.spec import MANIFEST, ModelSpec

EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints" / "scenes"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be asked for by name."""

    id: str
    family: str
    description: str
    nfe: int


# id -> version of the embedded checkpoint; None is the version that the checkpoint itself calls its best
NAMED: dict[str, str | None] = {"default": None, "default-tdm": "tdm", "default-teacher": "teacher"}


Reference = str | Path | ModelSpec  # a catalogue id, FOLDER or FOLDER@VERSION, or a spec for a folder without one


def resolve(model: Reference) -> ModelSpec:
    """The spec of a catalogue id, of a checkpoint folder, or of one version of it written FOLDER@VERSION.

    A spec stands for itself: it is how a diffusers folder that holds none is loaded.
    """
    if isinstance(model, ModelSpec):
        return model
    name = str(model)
    if name in NAMED:
        return read_spec(EMBEDDED, NAMED[name], name)
    folder, _, version = name.rpartition("@")
    if folder and Path(folder).is_dir():
        return read_spec(Path(folder), version, name)
    if Path(name).exists():
        return read_spec(Path(name), None, name)
    raise UnknownModel(f"model {name!r} is neither a known id nor a folder; known ids are {', '.join(NAMED)}")


def entries() -> list[CatalogEntry]:
    """The catalogue, with the number of evaluations of each model's own table."""
    specs = [resolve(name) for name in NAMED if _is_present(name)]
    return [
        CatalogEntry(spec.id, spec.family, spec.description, evaluations(spec.sigmas, spec.guidance)) for spec in specs
    ]


def _is_present(name: str) -> bool:
    """A checkpoint folder may hold fewer versions than the catalogue names, as a freshly trained one does."""
    version = NAMED[name]
    return version is None or version in json.loads((EMBEDDED / MANIFEST).read_text())["versions"]


def evaluations(sigmas: tuple[float, ...], guidance: float) -> int:
    """Network evaluations per picture: one a step, two with guidance (1 is off)."""
    return len(sigmas) * (1 if guidance == 1.0 else 2)
