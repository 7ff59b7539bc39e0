"""For stock diffusers: a checkpoint as a plain folder with its adapters fused, or an adapter as one file."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch

from tdm_serve.errors import ConfigError, OutputError
from tdm_serve.files import new_folder
from tdm_serve.machine import versions
from tdm_serve.models.adapters import fuse_adapters
from tdm_serve.models.catalog import configured
from tdm_serve.models.described import described_base, described_version
from tdm_serve.models.families.table import FAMILIES, INDEX, read_index
from tdm_serve.models.folders import network_of
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.load import examine
from tdm_serve.models.lora import Stated, combined, read_base, read_lora, write_lora
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import MANIFEST, ModelSpec
from tdm_serve.stock_call import StockCall, stock_call

logger = logging.getLogger(__name__)


def convert(model: str | Path, output: Path) -> Path:
    """Writes `model` to the new or empty folder `output`; it appears whole or not at all. Returns it.

    The folder's manifest says, as `stock`, how its stock pipeline is called to draw the same pictures: a table that the
    scheduler does not make by itself has to be given. Raises CheckpointError for one that stock cannot be given.
    """
    spec, files = examine(model)
    call = stock_call(spec)
    with new_folder(output) as folder, quiet_bars():
        _write(spec, call, checkpoint_hash(spec, files), folder)
        forget_paths(folder)
    return output


def usage(folder: Path) -> str:
    """One line of Python that draws a picture from a folder that `convert` wrote."""
    manifest = json.loads((folder / MANIFEST).read_text())
    stock = manifest["versions"][manifest["default"]]["stock"]
    loaded, called = ("".join(f", {name}={value}" for name, value in stock[part].items()) for part in ("load", "call"))
    return f"{FAMILIES[manifest['family']].pipeline}.from_pretrained({str(folder)!r}{loaded})(PROMPT{called})"


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
    described = read_base(Path(base) if Path(base).is_dir() else configured(base))
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


def _write(spec: ModelSpec, call: StockCall, source_hash: str, folder: Path) -> None:
    network = network_of(spec.family)
    index = read_index(spec.base)
    for name, value in index.items():
        if isinstance(value, list) and (spec.base / name).is_dir() and name not in (network, "scheduler"):
            shutil.copytree(spec.base / name, folder / name)
    fused = _network(spec.base / network)
    fuse_adapters(fused, spec.adapters, str(spec.base))
    fused.save_pretrained(folder / network)
    call.scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(call.scheduler).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (folder / MANIFEST).write_text(json.dumps(_manifest(spec, call, source_hash), indent=1) + "\n")


def _network(folder: Path) -> Any:
    """diffusers' class of a network's folder, in float32, so that adapters are added without rounding."""
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32)


def _manifest(spec: ModelSpec, call: StockCall, source_hash: str) -> dict[str, Any]:
    """The source's manifest, or what is known without one, reduced to one version, fused."""
    path = spec.base / MANIFEST
    source: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    described = described_version(replace(spec, adapters=()), str) | source.get("versions", {}).get(spec.version, {})
    optional = FAMILIES[spec.family].optional
    absent = set(optional) - {*FAMILIES[spec.family].present(spec.base, optional)}  # stock wants to be told
    stock = {"load": dict.fromkeys(sorted(absent)), "call": call.arguments}
    lineage = {"converted_from": spec.id, "source_hash": source_hash, "versions": versions()}
    version = described | {"adapter": None, "stock": stock}
    named = {"versions": {spec.version: version}, "default": spec.version, "lineage": lineage}
    return described_base(spec) | source | named
