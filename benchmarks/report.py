"""Writes the README's result tables from the committed result files; `--check` fails if the README is out of date."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METRICS = ROOT / "tdm_serve" / "checkpoints" / "scenes" / "training" / "metrics.jsonl"  # beside the weights
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin (python benchmarks/report.py) -->\n", "<!-- results: end -->"


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest_by(path: Path, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The newest row for every combination of keys."""
    return {tuple(row[key] for key in keys): row for row in rows(path)}


def machine(row: dict[str, Any]) -> str:
    found = row["machine"]
    return (
        f"{found['device']}, {found['cores']} cores, {found['threads']} threads, OpenMP policy "
        f"{found['omp_wait_policy']}, torch {found['versions']['torch']}, commit {found['commit']}"
    )


def table(header: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    rule = "|---" * len(header) + "|"
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    return [head, rule, *lines]


def quality() -> list[str]:
    """Strict score by category for every model and split that was measured."""
    found = list(latest_by(METRICS, "model", "split", "nfe", "guidance").values())
    first = found[0]
    categories = list(first["categories"])
    intro = (
        f"Strict score (everything right, or 0) on {first['n']} prompts, one picture each. The combinations of "
        "held-out prompts never occur in training; those of `val` do. Evaluations (NFE) are counted; a guidance pair "
        "is two."
    )
    command = f"`tdm-serve eval MODEL --split SPLIT --n {first['n']} --results {METRICS.relative_to(ROOT)}`"
    body = [
        [f"`{row['model']}`", row["split"], str(row["nfe"]), f"**{row['strict']:.3f}**", f"{row['soft']:.3f}"]
        + [f"{row['categories'][name]['strict']:.2f}" for name in categories]
        for row in sorted(found, key=lambda row: (row["split"], -row["nfe"]))
    ]
    header = ["model", "split", "NFE", "all", "soft", *(name.replace("_", " ") for name in categories)]
    return ["## Quality", "", intro, "", *table(header, body), "", f"{command}; {machine(first)}.", ""]


def latency() -> list[str]:
    """Our milliseconds by stage beside stock diffusers'."""
    row = rows(RESULTS / "latency.jsonl")[-1]
    stages = list(row["milliseconds"]["tdm-serve"])
    intro = (
        f"Prompt to PNG, {row['size']}, batch {row['batch']}, {row['dtype']}, {row['nfe']} evaluations, text padded to "
        f"{row['text_tokens']} tokens; both in one process in turn, {row['repeats']} rounds, median milliseconds."
    )
    body = [
        [name, *(f"{values[stage]['p50']:.1f}" if stage in values else "" for stage in stages)]
        for name, values in row["milliseconds"].items()
    ]
    ratio = row["diffusers_over_ours"]
    outcome = (
        f"Stock diffusers takes {ratio['p50']:.2f} times as long (p20 {ratio['p20']:.2f}, p80 {ratio['p80']:.2f}, "
        f"round by round). The pictures differ by at most {row['largest_difference']} of 255. "
        f"`python benchmarks/latency.py --keep`; {machine(row)}."
    )
    return ["## Latency", "", intro, "", *table(["", *stages], body), "", outcome, ""]


def rendered(text: str) -> str:
    """The README with fresh tables between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + "\n".join([*quality(), *latency()]) + "\n" + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    current = README.read_text()
    fresh = rendered(current)
    if args.check and fresh != current:
        raise SystemExit("README.md does not agree with benchmarks/results; run python benchmarks/report.py")
    README.write_text(fresh)


if __name__ == "__main__":
    main()
