"""An argument parser that learns its arguments only when it is the chosen one, and whose errors are one line.

`--help` of the whole must not import every command's module (and with it torch), so a sub-parser is created with a
function that fills it in. argparse calls `parse_known_args` of the chosen sub-parser only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

Fill = Callable[[argparse.ArgumentParser], None]


class LazyParser(argparse.ArgumentParser):
    """`fill` is called with the parser just before it first parses or prints its help."""

    def __init__(self, *args: Any, fill: Fill | None = None, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._fill = fill

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse, after filling in."""
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One sentence like every other error of ours, instead of a page of usage before it."""
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def add_commands(parser: argparse.ArgumentParser, kind: str, commands: Mapping[str, tuple[str, Fill]]) -> None:
    """Sub-commands: name -> help and fill. `kind` says what they are; the chosen name is parsed under it."""
    choices = parser.add_subparsers(
        dest=kind, metavar=kind.upper(), required=True, title=f"{kind}s", parser_class=LazyParser
    )
    for name, (text, fill) in commands.items():
        choices.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", fill=fill)
