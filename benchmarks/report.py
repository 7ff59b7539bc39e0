"""Writes the documents' result tables and plots from the committed result files; `--check` fails if one is out of date.

    python benchmarks/report.py

A section is a function from result rows to lines of Markdown; one whose benchmark was never run has no lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import plots
import report_export
import report_gpu
import report_latency
import report_quality
import report_serving
import report_speed
import report_training
from report_tables import ROOT

BEGIN, END = "<!-- results: begin (python benchmarks/report.py) -->\n", "<!-- results: end -->"
Section = Callable[[], list[str]]

DOCUMENTS: dict[Path, tuple[Section, ...]] = {
    ROOT / "README.md": (report_quality.shipped, report_quality.short, report_latency.short, report_serving.short),
    ROOT / "docs" / "training.md": (
        report_training.micro,
        report_training.mistakes,
        report_training.words,
        report_training.costs,
    ),
    ROOT / "docs" / "export.md": (report_export.inside,),
    ROOT / "docs" / "benchmarks.md": (
        report_quality.shipped,
        report_quality.nfe,
        report_latency.latency,
        report_latency.roofline,
        report_speed.throughput,
        report_serving.serving,
        report_serving.goodput,
        report_serving.scheduling,
        report_speed.cold_start,
        report_training.speed,
        report_export.engines,
        report_export.decoder,
        report_export.previews,
        report_export.web,
        report_gpu.kernels,
        report_gpu.full_size,
    ),
}


def rendered(text: str, sections: Sequence[Section]) -> str:
    """A document with fresh tables between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = [line for section in sections for line in section()]
    return before + BEGIN + "\n" + "\n".join(fresh) + "\n" + END + after


def outdated() -> list[str]:
    """Documents and plots that do not show the committed rows."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    found = [path for path, text in texts.items() if rendered(text, DOCUMENTS[path]) != text]
    return [str(path.relative_to(ROOT)) for path in (*found, *plots.outdated())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would be written")
    args = parser.parse_args()
    if args.check:
        if found := outdated():
            names = ", ".join(found)
            raise SystemExit(f"benchmarks/results is not what these show: {names}; run python benchmarks/report.py")
        return
    for path, sections in DOCUMENTS.items():
        path.write_text(rendered(path.read_text(), sections))
    for path in plots.draw_all():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
