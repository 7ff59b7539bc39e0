"""From a reference to a spec whose base lies on this machine: by name, from a hub, a folder, or a single file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tdm_serve.errors import CheckpointError, ConfigError, UnknownModel
from tdm_serve.models.entries import EMBEDDED, Entry, catalogue
from tdm_serve.models.families.table import INDEX, detect
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.single_file import with_file
from tdm_serve.models.sources import ABOUT, ADAPTERS, PREFIX, Hub, fetch, fetch_file, hub_of, wanted
from tdm_serve.models.spec import MANIFEST, Adapter, ModelSpec
from tdm_serve.models.stock import stock_spec

__all__ = ["EMBEDDED", "Reference", "configured", "evaluations", "resolve"]

OPTIONS = ("adapter", "base", "file", "name", "version")

# a catalogue id, hub:OWNER/NAME@REVISION, FOLDER or FOLDER@VERSION, each with options behind a plus; or a spec
Reference = str | Path | ModelSpec


def resolve(model: Reference) -> ModelSpec:
    """The spec of a reference. What a name or a hub reference needs and is not at hand is downloaded.

    Options behind it change it: `+base=` (folder or hub) and `+file=` (one safetensors file with the network) in place
    of an entry's own base, `+adapter=` in place of its adapter, `+version=` of a repository with a manifest, `+name=`.
    A spec stands for itself: it is how a diffusers folder is loaded whose schedule only the caller knows.

    Raises UnknownModel, ConfigError, CheckpointError or, where nothing can be fetched, DownloadError.
    """
    if isinstance(model, ModelSpec):
        return model
    what, options = _split(str(model))
    if what in catalogue():
        spec = _named(catalogue()[what], options)
    elif what.startswith(PREFIX):
        spec = _from_hub(what, str(model), options)
    else:
        spec = _from_folder(what, str(model), options)
    return replace(spec, id=options["name"]) if "name" in options else spec


def configured(reference: str | Path) -> Path:
    """The base folder of a reference, of which a hub's may hold configurations alone: enough to check an adapter."""
    entry = catalogue().get(str(reference))
    if entry is None or entry.base is None:
        return resolve(reference).base
    return fetch(entry.base, (INDEX, "*/config.json"))


def _split(text: str) -> tuple[str, dict[str, str]]:
    """What is named, and the options behind it. What exists under the whole text is a path without options."""
    if Path(text).exists():
        return text, {}
    what, *parts = re.split(r"\+(?=\w+=)", text)
    options = {key: value for key, _, value in (part.partition("=") for part in parts)}
    odd = [key for key, value in options.items() if key not in OPTIONS or not value]
    if odd or len(options) != len(parts):
        raise ConfigError(
            f"model {text!r} has the option {odd[0] if odd else 'that is there twice'!r}; its options are "
            f"{', '.join(f'+{key}=...' for key in OPTIONS)}"
        )
    return what, options


def _named(entry: Entry, options: Mapping[str, str]) -> ModelSpec:
    _only(options, entry.id, *(("name",) if entry.embedded is not None else ("adapter", "base", "file", "name")))
    if entry.embedded is not None:
        return read_spec(EMBEDDED, entry.embedded or None, entry.id)
    family = str(entry.fields["family"])
    base = _base_of(entry, family, options)
    if "file" in options:
        base = with_file(base, family, Path(options["file"]))
    return entry.spec(base, _adapters_of(entry, options))


def _base_of(entry: Entry, family: str, options: Mapping[str, str]) -> Path:
    """The entry's base folder, or the one that is named in its place."""
    place = options.get("base", "")
    if place and not place.startswith(PREFIX):
        return _folder(place)
    hub = hub_of(place) if place else entry.base
    assert hub is not None
    return fetch(hub, wanted(family, network="file" not in options))


def _adapters_of(entry: Entry, options: Mapping[str, str]) -> list[Adapter]:
    if "adapter" not in options:
        return [one.at(fetch_file(one.hub, one.file)) for one in entry.adapters]
    path = _existing(options["adapter"])
    return [entry.adapters[0].at(path)] if entry.adapters else [Adapter(path)]


def _from_hub(what: str, text: str, options: Mapping[str, str]) -> ModelSpec:
    """A repository that holds a diffusers folder: with a manifest of ours, or as its stock pipeline has it."""
    _only(options, text, "adapter", "name", "version")
    hub = hub_of(what)
    folder = fetch(hub, ABOUT)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{hub} holds no {INDEX}, so it is no diffusers pipeline; an adapter is named as +adapter="
        )
    pinned = Hub(hub.repo, folder.name)  # so that all files are of one commit
    return _described(fetch(pinned, (*wanted(detect(folder)), ADAPTERS)), what, options)


def _from_folder(what: str, text: str, options: Mapping[str, str]) -> ModelSpec:
    folder, _, version = what.rpartition("@")
    if folder and Path(folder).is_dir():
        _only(options, text, "adapter", "name")
        return _described(Path(folder), what, {**options, "version": version})
    if Path(what).is_file():
        raise CheckpointError(
            f"{what} is a single file, whose schedule and other parts are unknown; name the entry that it is like, as "
            f"in zimage-turbo+file={what}, or for an adapter zimage-tdm-r1+adapter={what}"
        )
    if Path(what).exists():
        _only(options, text, "adapter", "name", "version")
        return _described(Path(what), what, options)
    raise UnknownModel(
        f"model {what!r} is neither a known id nor a folder; known ids are {', '.join(catalogue())}, and a repository "
        "is named hub:OWNER/NAME"
    )


def _described(folder: Path, name: str, options: Mapping[str, str]) -> ModelSpec:
    """A folder by its manifest or, without one, by its stock scheduler."""
    if (folder / MANIFEST).is_file() or not (folder / INDEX).is_file() or "version" in options:
        spec = read_spec(folder, options.get("version"), name)
    else:
        spec = stock_spec(folder, name)
    return replace(spec, adapters=(Adapter(_existing(options["adapter"])),)) if "adapter" in options else spec


def _only(options: Mapping[str, str], what: str, *allowed: str) -> None:
    if odd := sorted(set(options) - set(allowed)):
        raise ConfigError(f"{what} takes no +{odd[0]}=; it takes {', '.join(f'+{key}=' for key in allowed)}")


def _folder(place: str) -> Path:
    if Path(place).is_dir():
        return Path(place)
    hint = f"; for a single file write +file={place}" if Path(place).is_file() else ""
    raise CheckpointError(f"base {place!r} is no folder; name a diffusers folder or hub:OWNER/NAME{hint}")


def _existing(place: str) -> Path:
    if not Path(place).exists():
        raise CheckpointError(f"adapter {place!r} is not there; name a file or a folder")
    return Path(place)


def evaluations(sigmas: tuple[float, ...], guidance: float) -> int:
    """Network evaluations per picture: one a step, two with guidance (1 is off)."""
    return len(sigmas) * (1 if guidance == 1.0 else 2)
