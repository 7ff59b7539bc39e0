"""`tdm-serve keys`: API keys of a service. A running one knows of every change at once."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from tdm_app import keys
from tdm_app.keys import SCOPES, Key
from tdm_app.state_cli import add_state_arguments, database
from tdm_serve.cli.lazy import add_commands
from tdm_serve.errors import InvalidRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """create, list and revoke."""
    add_commands(
        parser,
        "action",
        {
            "create": ("make a key and print it, once", _fill_create),
            "list": ("show all keys, without their secrets", add_state_arguments),
            "revoke": ("make a key useless", _fill_revoke),
        },
    )


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    return {"create": _create, "list": _list, "revoke": _revoke}[args.action](args)


def _fill_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is, for you to tell keys apart")
    parser.add_argument("--scope", choices=SCOPES, default="user", help="admins also read metrics and all feedback")
    add_state_arguments(parser)


def _fill_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="from `tdm-serve keys list`")
    add_state_arguments(parser)


def _create(args: argparse.Namespace) -> int:
    with database(args, create=True) as connection:
        _, text = keys.create(connection, args.name, args.scope)
    print(text)
    return 0


def _list(args: argparse.Namespace) -> int:
    with database(args) as connection:
        found = keys.listed(connection)
    rows = [("ID", "SCOPE", "CREATED", "REVOKED", "NAME"), *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[4]]))
    return 0


def _revoke(args: argparse.Namespace) -> int:
    with database(args) as connection:
        if not keys.revoke(connection, args.id):
            raise InvalidRequest(f"no key in use has the id {args.id!r}; `tdm-serve keys list` shows all")
    print(f"revoked {args.id}")
    return 0


def _row(key: Key) -> tuple[str, str, str, str, str]:
    return key.id, key.scope, _time(key.created_s), _time(key.revoked_s) if key.revoked_s else "-", key.name


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
