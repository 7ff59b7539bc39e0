"""Frozen dataclasses as configuration: one flag per field, a TOML file under them, errors that help.

A config class is the single place where a setting has its name, type and default. `add_dataclass_arguments` makes the
flags from it and `from_sources` an instance: defaults, then the file, then the flags. Field types: Path, int, float,
bool, str, Literal, tuple[X, ...] of those, and Optional of any.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tdm_serve.errors import ConfigError

T = TypeVar("T")

DEST = "config."  # keeps a field apart from the command's own arguments in the Namespace
NONE = "none"  # how a flag says None


def add_dataclass_arguments(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """One `--flag` per field of `cls`; only flags that are given end up in the Namespace."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        flag, dest = "--" + field.name.replace("_", "-"), DEST + field.name
        text = f"{describe(hints[field.name])} (default: {_show(_default(field))})"
        if hints[field.name] is bool:
            parser.add_argument(
                flag, dest=dest, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            parser.add_argument(
                flag,
                dest=dest,
                default=argparse.SUPPRESS,
                type=_from_text(hints[field.name]),
                metavar=field.name.upper(),
                help=text.replace("%", "%%"),
            )


def from_sources(cls: type[T], toml: Path | None, args: argparse.Namespace) -> T:
    """An instance from the defaults, the TOML file if there is one, and the flags, later ones winning."""
    values = {} if toml is None else read_toml(cls, toml)
    for name, value in vars(args).items():
        if name.startswith(DEST):
            values[name.removeprefix(DEST)] = value
    missing = [
        field.name for field in _fields(cls) if _default(field) is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs a value for {', '.join(missing)}; give it as a flag or in the file")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


def read_toml(cls: type[Any], path: Path) -> dict[str, Any]:
    """Field values from a TOML file, checked against the fields of `cls`."""
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    return check(cls, table, source=str(path))


def check(cls: type[Any], table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The table with every value in its field's type. Unknown keys and unfit values raise ConfigError."""
    hints = get_type_hints(cls)
    names = [field.name for field in _fields(cls)]
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")
    return {key: convert(value, hints[key], f"{source}: {key}") for key, value in table.items()}


def convert(value: Any, kind: Any, where: str) -> Any:
    """A value from TOML or JSON in the field's type, or ConfigError with the value and what was expected."""
    try:
        return _convert(value, kind)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} is {value!r} ({type(value).__name__}), expected {describe(kind)}") from None


def at_least(config: Any, low: float, *names: str) -> None:
    """For `__post_init__`: raises ValueError unless each named field is a number of at least `low`."""
    for name in names:
        if not getattr(config, name) >= low:  # so that NaN fails, too
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {low}")


def between(config: Any, low: float, high: float, *names: str) -> None:
    """For `__post_init__`: raises ValueError unless each named field is a number from `low` to `high`."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be between {low} and {high}")


def positive(config: Any, *names: str) -> None:
    """For `__post_init__`: raises ValueError unless each named field is a number above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be above 0")


def multiple_of(config: Any, factor: int, *names: str) -> None:
    """For `__post_init__`: raises ValueError unless each named field is a positive multiple of `factor`."""
    for name in names:
        value = getattr(config, name)
        if value < factor or value % factor:
            raise ValueError(f"{name} is {value}; it must be a multiple of {factor}")


def describe(kind: Any) -> str:
    """A type in words for help texts and errors."""
    arguments = get_args(kind)
    if _is_union(kind):
        return " or ".join(describe(argument) for argument in arguments)
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if get_origin(kind) is tuple:
        return f"list of {describe(arguments[0])}"
    names = {Path: "path", str: "text", types.NoneType: NONE}
    return names.get(kind) or str(kind.__name__)


def _convert(value: Any, kind: Any) -> Any:
    arguments = get_args(kind)
    if _is_union(kind):
        return _first_that_fits(value, arguments)
    if get_origin(kind) is Literal:
        return _member(value, arguments)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(value)
        items: Any = value
        return tuple(_convert(item, arguments[0]) for item in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind and not (kind is Path and isinstance(value, Path)):  # bool is no int here
        raise TypeError(value)
    return value


def _first_that_fits(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return _convert(value, kind)
        except (TypeError, ValueError):
            continue
    raise TypeError(value)


def _member(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise ValueError(value)


def _from_text(kind: Any) -> Callable[[str], Any]:
    """An argparse type for a field's type."""

    def parse(text: str) -> Any:
        try:
            return _parse(text, kind)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {describe(kind)}") from None

    return parse


def _parse(text: str, kind: Any) -> Any:
    arguments = get_args(kind)
    if _is_union(kind):
        return _parse_union(text, arguments)
    if get_origin(kind) is Literal:
        by_text = {str(choice): choice for choice in arguments}
        if text not in by_text:
            raise ValueError(text)
        return by_text[text]
    if get_origin(kind) is tuple:
        return tuple(_parse(part, arguments[0]) for part in text.split(",") if part)
    if kind is bool:
        return _parse(text, Literal["true", "false"]) == "true"
    return kind(text)


def _parse_union(text: str, kinds: tuple[Any, ...]) -> Any:
    if types.NoneType in kinds and text.lower() == NONE:
        return None
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _parse(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _show(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "none, must be given"
    if isinstance(value, tuple):
        parts: Any = value
        return ",".join(str(part) for part in parts)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
