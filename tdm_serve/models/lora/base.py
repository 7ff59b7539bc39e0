"""The modules of a base that adapters can change, in the order in which the real class holds them.

Kohya keys and the unnamed list can only be read with it. The class is built without memory, so this costs milliseconds
for six billion parameters, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import nn

from tdm_serve.errors import CheckpointError, ConfigError

CLASSES = ("PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel", "ZImageTransformer2DModel")


@dataclass(frozen=True, slots=True)
class Base:
    """A denoiser as adapters see it: module name -> weight shape, in the class's own order."""

    name: str
    class_name: str
    layers: Mapping[str, tuple[int, ...]]

    @property
    def component(self) -> str:
        """What pipelines call it; the prefix of its keys in diffusers' LoRA files."""
        return "unet" if self.class_name == "UNet2DConditionModel" else "transformer"

    def targeted(self, targets: Collection[str] | str) -> list[str]:
        """The modules that PEFT adapts for `target_modules`: names or their last parts, or one regular expression."""
        if isinstance(targets, str):
            try:
                return [name for name in self.layers if re.fullmatch(targets, name)]
            except re.error as error:
                raise ConfigError(f"target modules {targets!r} are no regular expression: {error}") from error
        return [name for name in self.layers if any(name == one or name.endswith(f".{one}") for one in targets)]


def base_of(model: nn.Module, name: str) -> Base:
    """Of a loaded denoiser; `name` is how errors call it."""
    layers = {
        key: tuple(module.weight.shape)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return Base(name, type(model).__name__, layers)


def read_base(folder: Path) -> Base:
    """Of a diffusers pipeline folder, or of its denoiser's folder, from the configuration alone."""
    places = [folder / part / "config.json" for part in ("transformer", "unet", "")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} is no diffusers folder: it has neither transformer/config.json nor unet's")
    try:
        config: Any = json.loads(path.read_text())
        class_name = str(cast(Mapping[str, Any], config)["_class_name"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no diffusers configuration: {error!r}") from error
    if class_name not in CLASSES:
        raise CheckpointError(f"{path} is of class {class_name!r}; adapters are read for {', '.join(CLASSES)}")
    try:
        with torch.device("meta"):
            model = getattr(diffusers, class_name).from_config(config)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} is no usable configuration of {class_name}: {error}") from error
    return base_of(model, str(folder))
