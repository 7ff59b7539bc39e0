"""An exported engine as a family: the same calls, each answered by a graph. No torch weights are loaded.

The checkpoint is needed for its tokenizer and its sampling table, and must be the one that the engine was made from.
Loading checks everything that could make other pictures than were verified, and says which of it does not match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from torch import nn

from tdm_serve.artifact import Artifact, check_checkpoint, check_files, check_kind, read_artifact
from tdm_serve.backends.base import needs_engine
from tdm_serve.backends.exported_families import FAMILIES
from tdm_serve.backends.parts import ExportedDenoiser, Parts
from tdm_serve.errors import ArtifactError, ConfigError
from tdm_serve.files import sha256
from tdm_serve.models.catalog import Reference
from tdm_serve.models.inspect import checkpoint_hash, encoder_hash
from tdm_serve.models.load import Loaded, Served, examine, pick_device, pick_dtype
from tdm_serve.models.placement import placement_on
from tdm_serve.models.spec import ModelSpec

RUNTIMES = {"onnx": "tdm_serve.backends.onnx", "pt2": "tdm_serve.backends.pt2"}
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def load_exported(
    references: Reference | Sequence[Reference],
    folder: Path,
    backend: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    wrap: Callable[[Parts], Parts] | None = None,
) -> tuple[Loaded, str]:
    """An engine's folder and its checkpoint, matched and opened, and the backend that "auto" stands for.

    `wrap` may put something before the graphs, such as a comparison.

    Raises ArtifactError with what does not match, ConfigError for settings that an engine has none of,
    BackendUnavailable or MissingExtra where its runtime is not here.
    """
    artifact = read_artifact(folder)
    name = artifact.kind if backend == "auto" else backend
    reference = _single(references)
    check_kind(artifact, name.partition("-")[0])
    check_files(folder, artifact)
    spec, files = examine(reference)
    digest = cache(sha256)
    whole = checkpoint_hash(spec, files, digest)
    check_checkpoint(artifact, spec.id, whole)
    _check_dtype(artifact, dtype)
    place = pick_device(device)
    parts: Parts = import_module(RUNTIMES[artifact.kind]).open_parts(folder, artifact, place, name)
    parts = parts if wrap is None else wrap(parts)
    narrowed = narrow(spec, artifact)
    placement = placement_on(place, pick_dtype(DTYPE_NAMES[artifact.dtype], place))
    model = FAMILIES[artifact.family](narrowed, placement, artifact, parts)
    return Loaded(model, (Served(narrowed, whole),), encoder_hash(spec, digest)), name


def _single(references: Reference | Sequence[Reference]) -> Reference:
    if isinstance(references, str | Path | ModelSpec):
        return references
    if len(references) != 1:
        raise ConfigError(f"an exported engine holds one version, and {len(references)} models were named; name one")
    return references[0]


def _check_dtype(artifact: Artifact, dtype: str) -> None:
    exported = DTYPE_NAMES[artifact.dtype]
    if dtype not in ("auto", exported):
        raise ArtifactError(f"the engine computes in {exported}, and {dtype} was asked for; leave the dtype out")


def narrow(spec: ModelSpec, artifact: Artifact) -> ModelSpec:
    """What an engine serves of its checkpoint: the exported sizes and text length, and no other."""
    width, height = (spec.width, spec.height) if (spec.width, spec.height) in artifact.sizes else artifact.sizes[0]
    return replace(
        spec,
        width=width,
        height=height,
        sizes=artifact.sizes,
        max_prompt_tokens=artifact.text,
        preview=cast(Any, artifact.preview),
    )


def as_backend(denoiser: nn.Module, name: str) -> ExportedDenoiser:
    """An exported denoiser runs by itself. Raises ConfigError for any other."""
    if not isinstance(denoiser, ExportedDenoiser):
        raise needs_engine(name)
    return denoiser
