"""For stock diffusers: a checkpoint as a plain folder with its adapters fused, or an adapter as one file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

from diffusers import FlowMatchEulerDiscreteScheduler

from tdm_serve.errors import CheckpointError, ConfigError, OutputError
from tdm_serve.files import new_folder
from tdm_serve.machine import versions
from tdm_serve.models.catalog import resolve
from tdm_serve.models.families.zimage import load_transformer
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.load import examine
from tdm_serve.models.lora import Stated, combined, read_base, read_lora, write_lora
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import MANIFEST, ModelSpec
from tdm_serve.sampling import sigma_grid

logger = logging.getLogger(__name__)

KEPT = ("model_index.json", "vae", "text_encoder", "tokenizer")


def convert(model: str | Path, output: Path) -> Path:
    """Writes `model` to the new or empty folder `output`; it appears whole or not at all. Returns it.

    Stock pipelines take their grid from the scheduler's shift, so a version whose table is not that grid is refused.
    """
    spec, files = examine(model)
    if spec.family != "zimage":
        raise CheckpointError(f"{spec.id} is of family {spec.family!r}; only zimage checkpoints are converted")
    if tuple(spec.sigmas) != sigma_grid(len(spec.sigmas), spec.shift) or spec.sampler != "euler":
        raise CheckpointError(f"{spec.id} was trained on a table that stock diffusers cannot be configured for")
    with new_folder(output) as folder, quiet_bars():
        _write(spec, checkpoint_hash(spec, files), folder)
        forget_paths(folder)
    return output


def convert_adapter(
    adapter: Path,
    base: str | Path,
    output: Path,
    format_name: str = "auto",
    stated: Stated | None = None,
    scale: float = 1.0,
    *,
    fold_alpha: bool = False,
) -> Path:
    """Writes a LoRA of any format that is read as `output`, which stock `load_lora_weights` takes. Returns it.

    It is checked against `base`, an id or a diffusers folder, of which only the configuration is read.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"output {str(output)!r} must be a file that ends in .safetensors")
    if output.exists():
        raise OutputError(f"{output} exists; name a new file")
    if scale == 0.0:
        raise ConfigError("scale is 0, which would leave nothing of the adapter; it must be another number")
    described = read_base(Path(base) if Path(base).is_dir() else resolve(base).base)
    lora = read_lora(adapter, described, format_name, stated)
    for warning in lora.warnings:
        logger.warning("%s", warning)
    return write_lora(combined([(lora, scale)]), output, described.component, fold_alpha=fold_alpha)


def forget_paths(folder: Path) -> None:
    """Absolute paths in a checkpoint's configs, such as diffusers' `_name_or_path`, become their last part.

    Elsewhere they mean nothing, and they tell where and by whom the files were made.
    """
    for path in (*folder.rglob("config.json"), folder / MANIFEST):
        content = json.loads(path.read_text())
        kept = _without_paths(content)
        if kept != content:
            path.write_text(json.dumps(kept, indent=1) + "\n")


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in cast(list[Any], value)]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _write(spec: ModelSpec, source_hash: str, folder: Path) -> None:
    for name in KEPT:
        source = spec.base / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)
    load_transformer(spec).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=spec.shift, use_dynamic_shifting=False).save_pretrained(folder / "scheduler")
    (folder / MANIFEST).write_text(json.dumps(_manifest(spec, source_hash), indent=1) + "\n")


def _manifest(spec: ModelSpec, source_hash: str) -> dict[str, Any]:
    """The source's manifest reduced to one version, fused."""
    manifest = json.loads((spec.base / MANIFEST).read_text())
    version = dict(manifest["versions"][spec.version]) | {"adapter": None}
    lineage = {"converted_from": spec.id, "source_hash": source_hash, "versions": versions()}
    return manifest | {"versions": {spec.version: version}, "default": spec.version, "lineage": lineage}
