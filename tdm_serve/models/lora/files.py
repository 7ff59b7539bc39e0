"""Opens adapter files: safetensors, or what torch.save wrote, which is never allowed to run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdm_serve.errors import CheckpointError

CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
LIST_KEY = "ema_parameters"
# how torch says that a pickle would have to call something to be opened; the rest is no pickle
CODE = ("Unsupported global", "Unsupported class", "unrecognized function", "Can only build")
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the PEFT config of a LoRA file


@dataclass(frozen=True, slots=True)
class Contents:
    """An opened adapter: tensors by key or, in an unnamed list, by place; `metadata` of safetensors; PEFT's config."""

    path: Path
    named: Mapping[str, Tensor] | None
    listed: tuple[Tensor, ...]
    metadata: Mapping[str, Any]
    config: Mapping[str, Any] | None


def open_adapter(path: Path) -> Contents:
    """The tensors and what travels with them. Raises CheckpointError for what is no whole adapter or holds code."""
    file, *beside = adapter_parts(path)
    config = _json(beside[0]) if beside else None
    content, metadata = _safetensors(file) if file.suffix == ".safetensors" else (_pickled(file), {})
    if isinstance(content, Mapping):
        return Contents(file, content, (), metadata, config)
    return Contents(file, None, content, metadata, config)


def adapter_parts(path: Path) -> list[Path]:
    """The file with the weights and, of a PEFT adapter, its configuration: everything that an adapter depends on."""
    file = _file_of(path)
    return [file, file.parent / CONFIG] if file.name in PEFT_FILES and (file.parent / CONFIG).is_file() else [file]


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in (*PEFT_FILES, DIFFUSERS_FILE) if (path / name).is_file()]
    if not found:
        raise CheckpointError(
            f"adapter folder {path} holds none of {', '.join((*PEFT_FILES, DIFFUSERS_FILE))}; name the file itself"
        )
    if found[0].name in PEFT_FILES and not (path / CONFIG).is_file():
        raise CheckpointError(f"adapter folder {path} lacks {CONFIG}, which says rank and alpha of a PEFT adapter")
    return found[0]


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"adapter {path} cannot be read: {error}; it is missing, cut short or no safetensors file; fetch it again"
        ) from error
    try:
        found: Any = json.loads(metadata.get(METADATA_KEY) or "{}")
    except ValueError as error:
        raise CheckpointError(f"adapter {path} has unusable metadata: {error!r}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"adapter {path} has unusable metadata: {METADATA_KEY} is no JSON object")
    return tensors, cast(dict[str, Any], found)


def _pickled(path: Path) -> Mapping[str, Tensor] | tuple[Tensor, ...]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in CODE):
            raise CheckpointError(
                f"adapter {path} is a pickle that holds more than tensors, so opening it could run code, and it is "
                "refused; ask for it as safetensors, or save its tensors alone with torch.save"
            ) from error
        raise CheckpointError(_unreadable(path)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(_unreadable(path)) from error
    return _tensors_of(content, path)


def _unreadable(path: Path) -> str:
    why = "it is cut short, or was not written by torch.save, so fetch it again" if path.exists() else "it is missing"
    return f"adapter {path} cannot be read: {why}"


def _tensors_of(content: Any, path: Path) -> Mapping[str, Tensor] | tuple[Tensor, ...]:
    """The list or state dict in what torch.save wrote; trainers wrap both in dicts of their own."""
    found: Any = content
    if isinstance(content, dict):
        wrapped = cast(dict[str, Any], content)
        found = wrapped.get(LIST_KEY, wrapped.get("state_dict", wrapped))
    values = list(cast(dict[str, Any], found).values() if isinstance(found, dict) else found or ())
    if not values or not all(isinstance(value, Tensor) for value in values):
        holds = (
            ", ".join(map(repr, list(cast(Any, content))[:4])) if isinstance(content, dict) else type(content).__name__
        )
        raise CheckpointError(
            f"adapter {path} holds neither named LoRA weights nor a list {LIST_KEY!r} of them; "
            f"it holds {holds or 'nothing'}"
        )
    if isinstance(found, dict):
        return {str(key): value.detach() for key, value in cast(dict[str, Tensor], found).items()}
    return tuple(value.detach() for value in values)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return cast(dict[str, Any], found)
