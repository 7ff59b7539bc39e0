"""`tdm-serve models`: the catalogue as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdm_serve.models.catalog import CatalogEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to print."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints every named model."""
    from tdm_serve.models import catalog

    entries = catalog.entries()
    if args.json:
        print(json.dumps({"models": [dataclasses.asdict(entry) | _guidance(entry) for entry in entries]}))
        return 0
    rows = [("ID", "FAMILY", "NFE", "GUIDANCE", "DESCRIPTION")]
    rows += [(entry.id, entry.family, str(entry.nfe), _shown(entry), entry.description) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, family, nfe, guidance, description in rows:
        line = f"{name:<{widths[0]}}  {family:<{widths[1]}}  {nfe:>{widths[2]}}  {guidance:<{widths[3]}}  {description}"
        print(line.rstrip())
    return 0


def _guidance(entry: CatalogEntry) -> dict[str, Any]:
    """What `--guidance-scale` is by default, and what turns it off: both as the model's family counts it."""
    from tdm_serve.models.families.table import FAMILIES
    from tdm_serve.validation import scale_of

    off = FAMILIES[entry.family].guidance_off
    return {"guidance_scale": scale_of(entry.guidance, off), "guidance_off": off}


def _shown(entry: CatalogEntry) -> str:
    scale, off = _guidance(entry).values()
    return f"{scale:g}, off" if scale == off else f"{scale:g}, {off:g} is off"
