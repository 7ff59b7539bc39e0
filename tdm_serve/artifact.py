"""The manifest beside an exported engine: the contract between the exporter and the runtime.

`artifact.json` says what an engine was made from and for: the checkpoint's digest, sizes, batch, text length, types,
the exact sigma table, every file with its digest, and the versions of what made it. The runtime serves nothing that
does not match. A folder without it was never finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from tdm_serve.errors import ArtifactError
from tdm_serve.files import sha256, write_atomically

MANIFEST = "artifact.json"
REPORT = "report.json"
FORMAT = 1

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FileFact:
    """One file of an engine, as it was written."""

    name: str
    bytes: int
    sha256: str


def fact_of(path: Path) -> FileFact:
    return FileFact(path.name, path.stat().st_size, sha256(path))


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported engine."""

    kind: str  # "onnx" or "pt2"
    family: str
    model: str  # what the checkpoint was called
    checkpoint_hash: str
    dtype: str
    quantise: str  # "none" or "int8"
    attention: str
    sizes: tuple[Size, ...]  # (width, height) in pixels
    batch: int  # most pictures in one evaluation
    text: int  # longest padded text, in tokens
    sigmas: tuple[float, ...]
    nfe: int  # a picture
    guidance: float
    channels: int  # of the latents
    factor: int  # pixels a latent, each way
    scale: float  # latents are (raw - shift) * scale
    shift: float
    preview: tuple[tuple[float, ...], ...]
    parts: Mapping[str, tuple[FileFact, ...]]  # the first file of a part is the one to open
    versions: Mapping[str, str]  # of the packages that made it
    machine: str  # the processor or GPU that it was made on
    report: str = ""  # digest of report.json; empty where the export was not verified

    def longest_side(self) -> int:
        """Of all sizes, in pixels."""
        return max(side for size in self.sizes for side in size)


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Comes last: a folder with a manifest is whole. Raises OutputError."""
    document = {"format": FORMAT, **asdict(artifact)}
    write_atomically(folder / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())


def read_artifact(folder: Path) -> Artifact:
    """The manifest of an engine's folder. Raises ArtifactError where there is none, or one that is not ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no exported engine: {MANIFEST} is missing; an export that was cut off never writes it, so "
            "run `tdm-serve export` again"
        )
    try:
        found: Any = json.loads(path.read_text())
        if not isinstance(found, dict) or cast(dict[str, Any], found).get("format") != FORMAT:
            raise ArtifactError(f"{path} does not declare format {FORMAT}; export the checkpoint again")
        return _parsed(cast(dict[str, Any], found))
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not usable: {error!r}; export the checkpoint again") from error


def _parsed(found: dict[str, Any]) -> Artifact:
    names = {field.name for field in fields(Artifact)}
    if odd := sorted(set(found) - names - {"format"}):
        raise ValueError(f"unknown entries {', '.join(odd)}")
    values = {name: found[name] for name in names if name in found}
    values["sizes"] = tuple((int(width), int(height)) for width, height in found["sizes"])
    values["sigmas"] = tuple(float(sigma) for sigma in found["sigmas"])
    values["preview"] = tuple(tuple(float(value) for value in row) for row in found["preview"])
    values["parts"] = {str(name): tuple(FileFact(**fact) for fact in facts) for name, facts in found["parts"].items()}
    return Artifact(**values)


def check_files(folder: Path, artifact: Artifact) -> None:
    """Raises ArtifactError, naming the file, unless everything is there as it was written, the report included."""
    for fact in (fact for facts in artifact.parts.values() for fact in facts):
        path = folder / fact.name
        if Path(fact.name).name != fact.name or not path.is_file():
            raise ArtifactError(f"{folder} is not whole: {fact.name} is missing; export the checkpoint again")
        if path.stat().st_size != fact.bytes:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes; its manifest promises {fact.bytes}")
        if sha256(path) != fact.sha256:
            raise ArtifactError(f"{path} was changed after the export: its digest is not the manifest's")
    if artifact.report and report_digest(folder) != artifact.report:
        raise ArtifactError(
            f"{folder / REPORT} is missing or was changed after the export; export the checkpoint again"
        )


def report_digest(folder: Path) -> str:
    """Of report.json, empty where there is none."""
    path = folder / REPORT
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def check_checkpoint(artifact: Artifact, model: str, checkpoint_hash: str) -> None:
    """Raises ArtifactError unless an engine was made from the checkpoint that is to be served.

    The digest covers weights, adapters, configurations and the sampling table.
    """
    if artifact.checkpoint_hash != checkpoint_hash:
        raise ArtifactError(
            f"the engine was exported from {artifact.model} with digest {artifact.checkpoint_hash}, but {model} has "
            f"{checkpoint_hash}; name that checkpoint, or export this one"
        )


def check_kind(artifact: Artifact, wanted: str) -> None:
    """Raises ArtifactError unless a backend for `wanted` can run the engine."""
    if artifact.kind != wanted:
        raise ArtifactError(f"the engine is of format {artifact.kind!r}; serve it with --backend {artifact.kind}")
