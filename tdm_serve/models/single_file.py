"""A network in one safetensors file, as communities share them, on a base folder that has the other parts.

diffusers reads the file, which may have its own names for the weights; what it makes of it is kept in the cache folder,
as a diffusers folder whose other parts are links to the base. The next load takes that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tdm_serve.errors import CheckpointError, OutputError
from tdm_serve.files import new_folder
from tdm_serve.models.folders import check_whole, network_of

logger = logging.getLogger(__name__)

CLASSES = {"zimage": "ZImageTransformer2DModel", "sd3": "SD3Transformer2DModel", "sd15": "UNet2DConditionModel"}
AUTOENCODER = "first_stage_model."  # how the original checkpoints of Stable Diffusion call theirs
ENCODER = "cond_stage_model."  # and SD1.5's CLIP
# what diffusers' converters raise for files that they do not understand
MISFITS = (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError)
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def with_file(base: Path, family: str, file: Path) -> Path:
    """The folder of `base` with what `file` holds in place of its own, made at the first call. Raises CheckpointError.

    Of SD1.5 a whole checkpoint brings its autoencoder and text encoder along, of SD3 its autoencoder.
    """
    if family not in CLASSES:
        raise CheckpointError(
            f"single files are read for {', '.join(CLASSES)}, not for family {family!r}; name a folder"
        )
    if not file.is_file() or file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no safetensors file; +file= takes one with the network's weights")
    check_whole(file)
    folder = cache_folder() / f"{file.stem}-{_key(base, family, file)}"
    if folder.is_dir():
        return folder
    logger.warning("%s is converted once, into %s", file, folder)
    with new_folder(folder) as staging:
        _convert(base, family, file, staging)
        for part in sorted(base.iterdir()):
            if not (staging / part.name).exists():
                (staging / part.name).symlink_to(part.resolve())
    return folder


def cache_folder() -> Path:
    """Where converted files are kept: everything in it can be made again."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdm-serve" / "single-files"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {base}: {error.strerror or error}") from error
    return base


def _key(base: Path, family: str, file: Path) -> str:
    """Changes with the file and the base; large files are told by size and time, not read."""
    facts = file.stat()
    text = f"{base.resolve()}\n{family}\n{file.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _convert(base: Path, family: str, file: Path, folder: Path) -> None:
    names, dtype = _looked_at(file)
    network = network_of(family)
    _part(CLASSES[family], base, network, file, folder, dtype)
    if any(name.startswith(AUTOENCODER) for name in names):
        _part("AutoencoderKL", base, "vae", file, folder, dtype)
    if family == "sd15" and any(name.startswith(ENCODER) for name in names):
        _text_encoder(base, file, folder, dtype)


def _part(kind: str, base: Path, name: str, file: Path, folder: Path, dtype: str) -> None:
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    options: dict[str, Any] = {"config": str(base), "subfolder": name, "local_files_only": True}
    try:
        model: Any = getattr(diffusers, kind).from_single_file(str(file), torch_dtype=getattr(torch, dtype), **options)
    except (*MISFITS, SingleFileComponentError) as error:
        raise CheckpointError(
            f"{file} does not hold the {name} of {base}: {_short(error)}; name the entry or base that it was made for"
        ) from error
    model.save_pretrained(folder / name)


def _text_encoder(base: Path, file: Path, folder: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = f"{ENCODER}transformer."
    found = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
    found = {key: value for key, value in found.items() if not key.endswith("position_ids")}
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder")).to(getattr(torch, dtype))
    own = set(model.state_dict())
    if not found.keys() >= own:  # older files say text_model. in front of every name, newer classes do not
        found = {key.removeprefix("text_model."): value for key, value in found.items()}
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not hold the text encoder of {base}: {_short(error)}") from error
    model.save_pretrained(folder / "text_encoder")


def _looked_at(file: Path) -> tuple[list[str], str]:
    """The names in a whole safetensors file, and the type that most of its weights have."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    types = Counter(str(entry["dtype"]) for entry in entries.values())
    odd = [kind for kind in types if kind not in FLOATS and kind.startswith("F")]
    if odd or not types.keys() & FLOATS.keys():
        raise CheckpointError(
            f"{file} holds weights of type {', '.join(odd or types) or 'none'}; float32, float16 and bfloat16 are read"
        )
    return list(entries), FLOATS[max((kind for kind in types if kind in FLOATS), key=types.__getitem__)]


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
