"""The families by name: which diffusers pipeline each one reads, from which parts. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tdm_serve.errors import CheckpointError

if TYPE_CHECKING:
    from tdm_serve.models.families.base import Family

INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """What is known of a family before it is loaded."""

    pipeline: str  # the class that a diffusers folder names
    place: str  # module:class of ours
    components: tuple[str, ...]  # subfolders with weights
    tokenizers: tuple[str, ...] = ("tokenizer",)
    optional: tuple[str, ...] = ()  # parts that a folder may name as absent
    shares: bool = True  # whether several versions can share one base in memory
    guidance_off: float = 1.0  # what the family's users call no guidance; a weight w inside is w - 1 + this outside

    def create(self) -> type[Family]:
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)

    def present(self, folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `names` that a folder has; only optional ones may be absent."""
        index = read_index(folder)
        return tuple(name for name in names if name not in self.optional or (index.get(name) or [None])[0] is not None)


_HERE = "tdm_serve.models.families"

FAMILIES: dict[str, FamilyEntry] = {
    "zimage": FamilyEntry(
        "ZImagePipeline", f"{_HERE}.zimage:ZImage", ("transformer", "vae", "text_encoder"), guidance_off=0.0
    ),
    "sd3": FamilyEntry(
        "StableDiffusion3Pipeline",
        f"{_HERE}.sd3:SD3",
        ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
        ("tokenizer", "tokenizer_2", "tokenizer_3"),
        optional=("text_encoder_3", "tokenizer_3"),
    ),
    "sd15": FamilyEntry("StableDiffusionPipeline", f"{_HERE}.sd15:SD15", ("unet", "vae", "text_encoder"), shares=False),
    "pixart": FamilyEntry(
        "PixArtAlphaPipeline", f"{_HERE}.pixart:PixArt", ("transformer", "vae", "text_encoder"), shares=False
    ),
}


def read_index(folder: Path) -> dict[str, Any]:
    """A diffusers folder's `model_index.json`."""
    try:
        found = json.loads((folder / INDEX).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / INDEX} is no table of a pipeline's parts")
    return cast(dict[str, Any], found)


def detect(folder: Path) -> str:
    """The family of a diffusers folder, by the pipeline class that it names."""
    name = read_index(folder).get("_class_name")
    for family, entry in FAMILIES.items():
        if entry.pipeline == name:
            return family
    known = ", ".join(f"{entry.pipeline} ({family})" for family, entry in FAMILIES.items())
    raise CheckpointError(f"{folder} is a {name}, a pipeline class that is not known here; known are {known}")
