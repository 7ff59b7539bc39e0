"""`tdm-serve models`: the catalogue as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to print."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints every named model."""
    from tdm_serve.models import catalog

    entries = catalog.entries()
    if args.json:
        print(json.dumps({"models": [dataclasses.asdict(entry) for entry in entries]}))
        return 0
    rows = [("ID", "FAMILY", "NFE", "DESCRIPTION")]
    rows += [(entry.id, entry.family, str(entry.nfe), entry.description) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, family, nfe, description in rows:
        print(f"{name:<{widths[0]}}  {family:<{widths[1]}}  {nfe:>{widths[2]}}  {description}".rstrip())
    return 0
