"""`tdm-serve models`: the catalogue as a table or as JSON, or all that is known of one model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdm_serve.models.listing import CatalogEntry

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to print, and of which model."""
    parser.add_argument("id", nargs="?", metavar="ID", help="one model, with its sources, licence and what is unsure")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints every named model, or one. Nothing is downloaded."""
    from tdm_serve.models import listing

    entries = listing.entries()
    if args.id is not None:
        entries = [listing.find(args.id, entries)]
    if args.json:
        print(json.dumps({"models": [dataclasses.asdict(entry) | _guidance(entry) for entry in entries]}))
    elif args.id is not None:
        print("\n".join(_details(entries[0])))
    else:
        _print_table(entries)
    return 0


def _print_table(entries: Sequence[CatalogEntry]) -> None:
    rows = [("ID", "FAMILY", "NFE", "GUIDANCE", "AT HAND", "DESCRIPTION")]
    rows += [
        (entry.id, entry.family, str(entry.nfe), _shown(entry), entry.state, entry.description) for entry in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[2] = row[2].rjust(widths[2])
        print("  ".join(cells).rstrip())


def _details(entry: CatalogEntry) -> list[str]:
    facts = {
        "model": entry.id,
        "is": entry.description,
        "family": entry.family,
        "base": entry.base + (", gated" if entry.gated else ""),
        "adapter": ", ".join(entry.adapters) or "none",
        "evaluations": str(entry.nfe),
        "guidance": _shown(entry),
        "schedule": entry.schedule,
        "sizes": entry.sizes,
        "licence": entry.licence,
        "verified": ", ".join(entry.verified),
        "at hand": entry.state,
    }
    lines = [f"{name + ':':<13}{value}" for name, value in facts.items()]
    for note in entry.notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return lines


def _guidance(entry: CatalogEntry) -> dict[str, Any]:
    """What `--guidance-scale` is by default, and what turns it off: both as the model's family counts it."""
    from tdm_serve.models.families.table import FAMILIES
    from tdm_serve.validation import scale_of

    off = FAMILIES[entry.family].guidance_off
    return {"guidance_scale": scale_of(entry.guidance, off), "guidance_off": off}


def _shown(entry: CatalogEntry) -> str:
    scale, off = _guidance(entry).values()
    return f"{scale:g}, off" if scale == off else f"{scale:g}, {off:g} is off"
