"""The published models as shapes (`architectures.toml`), written as diffusers folders without weights."""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from tdm_serve.errors import ConfigError
from tdm_serve.models.families.table import FAMILIES, INDEX

DATA = Path(__file__).with_name("architectures.toml")


@dataclass(frozen=True, slots=True)
class Part:
    """One network: its class as module:name, and the fields of its configuration."""

    place: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    parameters: int
    published: str  # what its authors say of its size; empty where they say nothing

    @property
    def library(self) -> str:
        return self.place.partition(":")[0]

    @property
    def kind(self) -> Any:
        return getattr(importlib.import_module(self.library), self.place.partition(":")[2])

    def write(self, folder: Path, *, tiny: bool) -> None:
        """Its `config.json`."""
        fields = {**self.config, **(self.tiny if tiny else {})}
        folder.mkdir(parents=True)
        if self.library == "diffusers":
            text = json.dumps({"_class_name": self.kind.__name__, **fields}, indent=1)
        else:
            text = self.kind.config_class(**fields, architectures=[self.kind.__name__]).to_json_string()
        (folder / "config.json").write_text(text)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One published base. `parts` and `tokenizers` are by their subfolders."""

    name: str
    family: str
    bases: tuple[str, ...]  # repositories with these shapes
    parts: Mapping[str, str]
    tokenizers: Mapping[str, str]

    def write(self, folder: Path, *, tiny: bool, without: frozenset[str]) -> None:
        """A diffusers folder with configurations and byte-level tokenizers, and no weights."""
        from tdm_serve.models.byte_tokenizer import Kind, write_tokenizer

        index: dict[str, Any] = {"_class_name": FAMILIES[self.family].pipeline}
        for name, part in ((name, parts()[part]) for name, part in self.parts.items()):
            index[name] = [None, None] if name in without else [part.library, part.kind.__name__]
            if name not in without:
                part.write(folder / name, tiny=tiny)
        for name, kind in self.tokenizers.items():
            index[name] = [None, None] if name in without else ["transformers", "PreTrainedTokenizerFast"]
            if name not in without:
                write_tokenizer(cast(Kind, kind), folder / name)
        (folder / INDEX).write_text(json.dumps(index, indent=1))


@cache
def parts() -> Mapping[str, Part]:
    """Every part by its name."""
    return {
        name: Part(found["class"], found["config"], found["tiny"], found["parameters"], found.get("published", ""))
        for name, found in _read()["parts"].items()
    }


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every architecture by its name."""
    return {
        name: Architecture(name, found["family"], tuple(found["bases"]), found["parts"], found["tokenizers"])
        for name, found in _read()["models"].items()
    }


def architecture_of(base: str) -> Architecture:
    """The one of a published base, by its repository. Raises ConfigError."""
    for architecture in architectures().values():
        if base in architecture.bases:
            return architecture
    known = ", ".join(base for one in architectures().values() for base in one.bases)
    raise ConfigError(f"the architecture of {base} is not known here, so it cannot have random weights; known: {known}")


def _read() -> dict[str, Any]:
    return tomllib.loads(DATA.read_text())
