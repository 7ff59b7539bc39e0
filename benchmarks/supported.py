"""Writes the README's table of supported models from the catalogue; `--check` fails if it is out of date.

    python benchmarks/supported.py

Memory is computed, not measured: parameters of all networks (`models/architectures.toml`, counted by a test), two bytes
each. What a model was verified with is what the catalogue says, and no more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from report_tables import table

from tdm_serve.models.architectures import architecture_of, parts
from tdm_serve.models.entries import EMBEDDED, Entry, catalogue
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.folders import base_files
from tdm_serve.models.listing import CatalogEntry, entries
from tdm_serve.validation import scale_of

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- models: begin (python benchmarks/supported.py) -->\n", "<!-- models: end -->"
BYTES = 2  # of a weight in bfloat16
WORDS = """\
Guidance is as the model's family counts it, with what is off behind it. Weights are all networks, text encoders
included, computed from their parameters; working memory comes on top. Verified: *tiny parity*: the picture of stock
diffusers on a tiny model of the real classes with random weights; *full-size random*: run at full size with random
weights; *real weights*: run with the published weights. Of the models that need a download no weights were at hand
where this was built."""
HEADER = ["model", "base", "adapter", "NFE", "guidance", "weights, bfloat16", "licence", "verified"]


def section() -> str:
    """The table and what its words mean."""
    body = [_row(entry, catalogue()[entry.id]) for entry in entries()]
    return "\n".join([*table(HEADER, body), "", WORDS, ""])


def _row(shown: CatalogEntry, entry: Entry) -> list[str]:
    off = FAMILIES[shown.family].guidance_off
    scale = scale_of(shown.guidance, off)
    return [
        f"`{shown.id}`",
        shown.base if entry.base is None else entry.base.repo,
        ", ".join(one.hub.repo for one in entry.adapters) or ", ".join(shown.adapters) or "none",
        str(shown.nfe),
        f"{scale:g} (off)" if scale == off else f"{scale:g} ({off:g} is off)",
        _weights(entry),
        shown.licence,
        ", ".join(shown.verified),
    ]


def _weights(entry: Entry) -> str:
    if entry.base is None:
        size = sum(path.stat().st_size for path in base_files(EMBEDDED, "zimage"))
        return f"{size / 1e9:.2f} GB on disk"
    count = sum(parts()[part].parameters for part in architecture_of(entry.base.repo).parts.values())
    return f"{BYTES * count / 1e9:.1f} GB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where `--check` finds another table than it would write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    before = README.read_text()
    head, _, rest = before.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        sys.exit(f"{README} lacks the marks {BEGIN.strip()} and {END}")
    after = f"{head}{BEGIN}\n{section()}\n{END}{tail}"
    if args.check:
        return int(after != before)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
