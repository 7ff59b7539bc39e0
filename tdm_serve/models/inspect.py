"""Looks at a checkpoint's files before anything is loaded: complete, untruncated, safetensors only."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from tdm_serve.errors import CheckpointError
from tdm_serve.files import sha256
from tdm_serve.models.families.table import FAMILIES, INDEX
from tdm_serve.models.lora.files import adapter_parts
from tdm_serve.models.spec import Adapter, ModelSpec

PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
NETWORKS = frozenset({"transformer", "unet", "vae"})  # diffusers' parts; text encoders are transformers'


def weight_files(spec: ModelSpec) -> list[Path]:
    """Every weight file of a version, checked; sharded components list all of their shards."""
    return [*base_files(spec), *adapter_files(spec)]


def base_files(spec: ModelSpec) -> list[Path]:
    """The weight files that all versions of a base share, checked."""
    if not (spec.base / INDEX).exists():
        raise CheckpointError(f"{spec.base} is no checkpoint: {INDEX} is missing")
    entry = FAMILIES[spec.family]
    for name in entry.present(spec.base, entry.tokenizers):
        if not (spec.base / name).exists():
            raise CheckpointError(f"{spec.base} is no checkpoint: {name} is missing")
    components = entry.present(spec.base, entry.components)
    files = [path for name in components for path in _component_files(spec.base / name, _stem(name))]
    for path in files:
        _check_whole(path)
    return files


def _stem(component: str) -> str:
    return "diffusion_pytorch_model" if component in NETWORKS else "model"


def adapter_files(spec: ModelSpec) -> list[Path]:
    """The files of a version alone, checked; what torch.save wrote is checked when it is read."""
    files: list[Path] = []
    for adapter in spec.adapters:
        if not adapter.path.exists():
            raise CheckpointError(f"{spec.base} names the adapter {adapter.path.name}, which is missing")
        files += adapter_parts(adapter.path)
    for path in files:
        if path.suffix == ".safetensors":
            _check_whole(path)
    return files


def _component_files(folder: Path, stem: str) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder.parent} is no checkpoint: {folder.name}/config.json is missing")
    index = folder / f"{stem}.safetensors.index.json"
    files = [folder / name for name in (_shards(index) if index.is_file() else [f"{stem}.safetensors"])]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(_missing_message(missing[0]))
    return files


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is no index of weight files: {error!r}") from error


def _missing_message(path: Path) -> str:
    pickled = sorted(other.name for other in path.parent.iterdir() if other.suffix in PICKLES)
    if pickled:
        return (
            f"{path.parent} holds {pickled[0]}, a pickle, which can run code when it is opened and is refused; "
            f"save the weights as {path.name}"
        )
    return f"weight file {path} is missing"


def _check_whole(path: Path) -> None:
    """Compares a safetensors file's length with what its header promises."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise CheckpointError(f"weight file {path} is no safetensors file or is cut short")
            header = json.loads(file.read(length))
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        promised = 8 + length + max(ends, default=0)
    except (struct.error, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"weight file {path} is no safetensors file or is cut short") from error
    except OSError as error:
        raise CheckpointError(f"weight file {path} cannot be read: {error.strerror or error}") from error
    if size != promised:
        raise CheckpointError(f"weight file {path} has {size} bytes; its header promises {promised}")


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
