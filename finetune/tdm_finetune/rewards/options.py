"""The short form in which rewards are named: `scenes:1.0,http(url=http://127.0.0.1:9000,timeout_s=20):0.5`.

    mixture = part {"," part}
    part    = name ["(" option {"," option} ")"] [":" weight]
    option  = key "=" value

A weight left out is 1. A value with a comma, a parenthesis or a space around it goes in double quotes, where a
backslash takes the next character as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from tdm_serve.config import convert, describe
from tdm_serve.errors import ConfigError

EXAMPLE = "an example is scenes:1.0,http(url=http://127.0.0.1:9000,timeout_s=20):0.5"


@dataclass(frozen=True, slots=True)
class Named:
    """One part of a mixture as it was written; option values are still text."""

    name: str
    weight: float = 1.0
    options: dict[str, str] = field(default_factory=dict[str, str])


def parse(text: str) -> list[Named]:
    """The parts of a mixture. Raises ConfigError that shows the part which is not in the short form."""
    if not text.strip():
        raise ConfigError(f"the reward is empty; name one or more: {EXAMPLE}")
    return [_part(piece, text) for piece in _split(text, ",", text)]


def typed(where: str, factory: Callable[..., Any], options: dict[str, str]) -> dict[str, Any]:
    """The options with values in the types of the factory's parameters; ConfigError for what does not fit."""
    parameters = inspect.signature(factory).parameters
    hints = get_type_hints(factory)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    for key in options:
        if key not in named and not takes_any:
            raise ConfigError(f"{where} has no option {key!r}; it takes {_listed(named, hints)}")
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(
                f"{where} needs the option {name!r}, as in {where}({name}=...); it takes {_listed(named, hints)}"
            )
    return {key: _value(value, hints.get(key, str), f"{where}: {key}") for key, value in options.items()}


def _part(piece: str, text: str) -> Named:
    head, *rest = _split(piece, ":", text)
    if len(rest) > 1:
        raise ConfigError(f"{piece.strip()!r} in the reward {text!r} has {len(rest)} weights; {EXAMPLE}")
    weight = _weight(rest[0], text) if rest else 1.0
    name, options = head.strip(), {}
    if "(" in name:
        name, _, inside = name.partition("(")
        if not inside.endswith(")"):
            raise ConfigError(f"{head.strip()!r} in the reward {text!r} goes on after its options; {EXAMPLE}")
        options = dict(_options(inside[:-1], text))
    name = name.strip()
    if not name:
        raise ConfigError(f"a name is missing before {piece.strip()!r} in the reward {text!r}; {EXAMPLE}")
    return Named(name, weight, options)


def _weight(written: str, text: str) -> float:
    try:
        weight = float(written)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"the weight {written.strip()!r} in the reward {text!r} is no finite number; {EXAMPLE}")
    return weight


def _options(inside: str, text: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for option in _split(inside, ",", text) if inside.strip() else []:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not key or not equals:
            raise ConfigError(
                f"{option.strip()!r} in the reward {text!r} is no option of the form key=value; {EXAMPLE}"
            )
        if key in seen:
            raise ConfigError(f"the option {key!r} is given twice in the reward {text!r}")
        seen.add(key)
        yield key, _unquoted(value)


def _split(text: str, separator: str, whole: str) -> list[str]:
    """`text` at the separators that are neither in parentheses nor in quotes."""
    pieces, depth, quoted, escaped = [""], 0, False, False
    for character in text:
        if character == separator and not depth and not quoted:
            pieces.append("")
            continue
        pieces[-1] += character
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    if depth or quoted:
        missing = "quote" if quoted else "parenthesis"
        raise ConfigError(f"a {missing} is not matched in the reward {whole!r}; {EXAMPLE}")
    return pieces


def _unquoted(value: str) -> str:
    if len(value) < 2 or not (value.startswith('"') and value.endswith('"')):
        return value
    plain, escaped = "", False
    for character in value[1:-1]:
        escaped = character == "\\" and not escaped
        plain += "" if escaped else character
    return plain


def _value(text: str, kind: Any, where: str) -> Any:
    """Text in the parameter's type: as the number or truth value that it reads as if that fits, else as it is."""
    for candidate in (_literal(text), text):
        try:
            return convert(candidate, kind, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} is {text!r}, expected {describe(kind)}")


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _listed(parameters: dict[str, inspect.Parameter], hints: dict[str, Any]) -> str:
    if not parameters:
        return "no options"
    described: list[str] = []
    for name, parameter in parameters.items():
        default = "" if parameter.default is inspect.Parameter.empty else f", default {parameter.default!r}"
        described.append(f"{name} ({describe(hints.get(name, str))}{default})")
    return "; ".join(described)
