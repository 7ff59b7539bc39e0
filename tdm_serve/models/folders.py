"""Looks at a diffusers folder's files before anything is loaded: complete, untruncated, safetensors only."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tdm_serve.errors import CheckpointError
from tdm_serve.models.families.table import FAMILIES, INDEX

PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
NETWORKS = frozenset({"transformer", "unet", "vae"})  # diffusers' parts; text encoders are transformers'
VOCABULARIES = (
    frozenset({"tokenizer.json"}),
    frozenset({"spiece.model"}),
    frozenset({"tokenizer.model"}),
    frozenset({"vocab.json", "merges.txt"}),
)


def base_files(base: Path, family: str) -> list[Path]:
    """The weight files that all versions of a base share, checked."""
    if not (base / INDEX).exists():
        raise CheckpointError(f"{base} is no checkpoint: {INDEX} is missing")
    entry = FAMILIES[family]
    for name in entry.present(base, entry.tokenizers):
        _check_tokenizer(base / name)
    components = entry.present(base, entry.components)
    files = [path for name in components for path in component_files(base, name)]
    for path in files:
        check_whole(path)
    return files


def _check_tokenizer(folder: Path) -> None:
    """One of the sets of files that a tokenizer is made from; a broken download may have left a part of one."""
    held = {path.name for path in folder.glob("*")}
    if not any(one <= held for one in VOCABULARIES):
        raise CheckpointError(
            f"{folder.parent} is no checkpoint: {folder.name} is missing, or holds no "
            f"{', no '.join(' with '.join(sorted(one)) for one in VOCABULARIES)}"
        )


def network_of(family: str) -> str:
    """The subfolder of a family's denoising network; the table of families names it first."""
    return FAMILIES[family].components[0]


def stem_of(component: str) -> str:
    return "diffusion_pytorch_model" if component in NETWORKS else "model"


def component_files(base: Path, name: str) -> list[Path]:
    """The weight files of one part; a sharded one lists all of its shards. Raises CheckpointError for a missing one."""
    folder, stem = base / name, stem_of(name)
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


def check_whole(path: Path) -> None:
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
