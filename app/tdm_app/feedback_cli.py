"""`tdm-serve feedback`: ratings out of a service's state, as TDM-R1 trains from them, or out of the world."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tdm_app import feedback_table
from tdm_app.state_cli import add_state_arguments, database
from tdm_serve.cli.lazy import add_commands
from tdm_serve.errors import InvalidRequest
from tdm_serve.files import write_atomically

STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """export and delete."""
    add_commands(
        parser,
        "action",
        {
            "export": ("write all ratings for `tdm-serve finetune tdm-r1`", _fill_export),
            "delete": ("delete ratings for good", _fill_delete),
        },
    )


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    return {"export": _export, "delete": _delete}[args.action](args)


def _fill_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="JSON lines, one rating each; - prints them")
    add_state_arguments(parser)


def _fill_delete(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--id", help="of one answer of /v1/feedback")
    what.add_argument("--image", metavar="ID", help="all ratings of a picture, and its recipe")
    what.add_argument("--owner", metavar="KEY_ID", help="all ratings and recipes of an API key; '' for those without")
    what.add_argument("--all", action="store_true", help="all ratings and recipes")
    add_state_arguments(parser)


def _export(args: argparse.Namespace) -> int:
    with database(args) as connection:
        ratings = list(feedback_table.everything(connection))
    usable = [rating for rating in ratings if rating.usable]
    text = "".join(json.dumps(rating.record(), ensure_ascii=False) + "\n" for rating in usable)
    if args.file == STDOUT:
        sys.stdout.write(text)
        return 0
    write_atomically(Path(args.file), text.encode())
    skipped = len(ratings) - len(usable)
    unusable = ", ".join(feedback_table.UNUSABLE)
    note = f"; left out {skipped} whose recipes have what training has no place for: {unusable}" if skipped else ""
    print(f"wrote {len(usable)} ratings to {args.file}{note}")
    return 0


def _delete(args: argparse.Namespace) -> int:
    with database(args) as connection:
        count = feedback_table.delete(connection, feedback_id=args.id, image_id=args.image, owner=args.owner)
    if args.id and not count:
        raise InvalidRequest(f"no feedback has the id {args.id!r}; GET /v1/feedback lists them")
    print(f"deleted {count} ratings")
    return 0
