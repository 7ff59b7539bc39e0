"""Settings from flags, environment and file: where each value came from, and what is wrong in a sentence."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from tdm_app.settings import NONE, PREFIX, Settings, read_toml, split
from tdm_serve.errors import ConfigError

DEST = "setting."  # keeps a setting apart from the command's own arguments in the Namespace
MASK = "********"
DEFAULT = "default"


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(Settings.model_fields)) -> None:
    """One flag per named field of Settings but secrets, which every user of the machine could read in the process list.

    Values stay text; the class checks them, so that a flag, a variable and the file are held to the same rules.
    """
    for name, field in Settings.model_fields.items():
        if _is_secret(field) or name not in names:
            continue
        flag, dest = flag_of(name), DEST + name
        shown = "see `--print-config`" if field.default_factory else _text(field.default)
        text = f"{field.description} (default: {shown})".replace("%", "%%")
        if bool in (field.annotation, *get_args(field.annotation)):
            parser.add_argument(
                flag, dest=dest, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=text
            )
        elif get_origin(field.annotation) is tuple:
            parser.add_argument(
                flag, dest=dest, default=argparse.SUPPRESS, action="extend", type=split, metavar="A,B,...", help=text
            )
        else:
            parser.add_argument(flag, dest=dest, default=argparse.SUPPRESS, metavar="VALUE", help=text)


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name.removeprefix(DEST): value for name, value in vars(args).items() if name.startswith(DEST)}


def load(flags: Mapping[str, Any] | None = None) -> tuple[Settings, dict[str, str]]:
    """The settings and where each came from. ConfigError names the key, the value and what is allowed."""
    given = dict(flags or {})
    variables = _variables()
    for name, variable in variables.items():
        if name not in Settings.model_fields:
            raise ConfigError(f"{variable} is no setting; {_near(name, PREFIX, str.upper)}")
    try:
        settings = Settings(**given)
    except ValidationError as error:
        path = given.get("config") or os.environ.get(f"{PREFIX}CONFIG")
        raise ConfigError(_sentence(error, _sources(given, variables, path))) from None
    return settings, _sources(given, variables, settings.config)


def show(settings: Settings, sources: Mapping[str, str]) -> str:
    """The settings as a TOML file that would give them again, each with its source; secrets are masked."""
    lines: list[str] = []
    for name, source in sources.items():
        value = getattr(settings, name)
        if value is None or isinstance(value, SecretStr) or name == "config":
            text = MASK if isinstance(value, SecretStr) else _text(value)
            lines.append(f"# {name} = {text}  # {source}")
        else:
            lines.append(f"{name} = {_toml(value)}  # {source}")
    return "\n".join(lines)


def flag_of(name: str) -> str:
    """`max_batch` -> `--max-batch`."""
    return "--" + name.replace("_", "-")


def _variables() -> dict[str, str]:
    """Setting -> the variable that gives it; empty ones give nothing."""
    return {
        name.lower().removeprefix(PREFIX.lower()): name
        for name, value in os.environ.items()
        if name.lower().startswith(PREFIX.lower()) and value
    }


def _sources(flags: Mapping[str, Any], variables: Mapping[str, str], path: str | Path | None) -> dict[str, str]:
    table = read_toml(Path(path)) if path else {}
    names = dict.fromkeys([*Settings.model_fields, *table], DEFAULT)
    return {
        name: flag_of(name) if name in flags else variables.get(name) or (str(path) if name in table else DEFAULT)
        for name in names
    }


def _sentence(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first error, which names the setting, the value, its source and what is allowed."""
    problem = error.errors()[0]
    name = str(problem["loc"][0])
    source = sources.get(name, DEFAULT)
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown setting {name!r}; {_near(name)}"
    field = Settings.model_fields[name]
    value = MASK if _is_secret(field) else repr(problem["input"])
    reason = problem["msg"].partition(", ")[2] if problem["type"] == "value_error" else f"allowed: {_allowed(name)}"
    return f"{name} is {value} ({source}); {reason}"


def _near(name: str, prefix: str = "", change: Any = str) -> str:
    names = list(Settings.model_fields)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(prefix + change(match) for match in near)}?"
    return f"known: {', '.join(prefix + change(known) for known in names)}"


def _allowed(name: str) -> str:
    """What a setting takes, from its JSON schema."""
    schema = Settings.model_json_schema()["properties"][name]
    return " or ".join(_kind(option) for option in schema.get("anyOf", [schema]))


def _kind(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"enum": choices}:
            return ", ".join(map(str, choices))
        case {"type": "null"}:
            return NONE
        case {"type": "integer" | "number" as kind}:
            word = "a whole number" if kind == "integer" else "a number"
            return f"{word}{_bounds(schema)}"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "array"}:
            return "a list of texts, at least one" if "minItems" in schema else "a list of texts"
        case {"pattern": pattern}:
            return f"text like {pattern}"
        case {"format": "path"}:
            return "a path"
        case _:
            return "text"


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high, above = (schema.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    if above is not None:
        return f" above {above:g}"
    if low is None:
        return ""
    return f", {low} or more" if high is None else f", {low} to {high}"


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))


def _text(value: Any) -> str:
    """A value as a flag would give it."""
    if value is None:
        return NONE
    if isinstance(value, tuple):
        parts: Any = value
        return ",".join(map(str, parts)) or "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        parts: Any = value
        return f"[{', '.join(map(_toml, parts))}]"
    if isinstance(value, str | Path):
        return json.dumps(str(value)).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
