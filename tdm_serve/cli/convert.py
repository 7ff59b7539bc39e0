"""`tdm-serve convert`: a checkpoint as a plain diffusers folder that stock pipelines load."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, and where to."""
    parser.add_argument("model", metavar="MODEL", help="an id (see `tdm-serve models`) or a folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")


def run(args: argparse.Namespace) -> int:
    """Prints the folder that was written."""
    from tdm_serve.convert import convert

    print(convert(args.model, args.output))
    return 0
