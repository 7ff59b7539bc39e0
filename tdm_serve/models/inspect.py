"""The files of a version, all checked before anything is loaded, and digests of what its pictures depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from tdm_serve.errors import CheckpointError
from tdm_serve.files import sha256
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.folders import NETWORKS, base_files, check_whole
from tdm_serve.models.lora.files import adapter_parts
from tdm_serve.models.spec import Adapter, ModelSpec


def weight_files(spec: ModelSpec) -> list[Path]:
    """Every weight file of a version, checked; sharded components list all of their shards."""
    return [*base_files(spec.base, spec.family), *adapter_files(spec)]


def adapter_files(spec: ModelSpec) -> list[Path]:
    """The files of a version alone, checked; what torch.save wrote is checked when it is read."""
    files: list[Path] = []
    for adapter in spec.adapters:
        if not adapter.path.exists():
            raise CheckpointError(f"{spec.base} names the adapter {adapter.path.name}, which is missing")
        files += adapter_parts(adapter.path)
    for path in files:
        if path.suffix == ".safetensors":
            check_whole(path)
    return files


Digest = Callable[[Path], str]


def checkpoint_hash(spec: ModelSpec, files: Iterable[Path], digest: Digest = sha256) -> str:
    """Short digest of weights, configs, chat template and sampling table: equal digests, equal pixels.

    The manifest itself is not in it: descriptions, lineage and the preview's matrix change no picture.
    """
    texts = [path for ending in ("json", "jinja", "txt", "model") for path in sorted(spec.base.glob(f"*/*.{ending}"))]
    paths = (*files, *texts)
    total = hashlib.sha256(b"".join(bytes.fromhex(digest(path)) for path in paths))
    total.update(repr((spec.sampler, spec.sigmas, spec.guidance)).encode())
    if (beyond := (spec.prediction, spec.betas, spec.times)) != ("flow", None, ()):  # so that older digests stay
        total.update(repr(beyond).encode())
    if spec.tables:
        total.update(repr(spec.tables).encode())
    stated = [replace(one, path=Path()) for one in spec.adapters]
    if any(one != Adapter(Path()) for one in stated):
        total.update(repr(stated).encode())
    return total.hexdigest()[:16]


def encoder_hash(spec: ModelSpec, digest: Digest = sha256) -> str:
    """Short digest of everything that turns a prompt into text features."""
    entry = FAMILIES[spec.family]
    encoders = tuple(name for name in entry.components if name not in NETWORKS)
    folders = [spec.base / name for name in entry.present(spec.base, (*encoders, *entry.tokenizers))]
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(digest(path) for path in paths).encode()).hexdigest()[:16]
