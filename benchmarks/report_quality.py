"""Quality: the strict score of what is shipped by category, and the score against network evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from report_tables import METRICS, ROOT, Row, latest, machine, plot, results, rows, section, table

METHODS = {"default-teacher": "teacher", "default-tdm": "TDM", "default": "TDM-R1"}


def shipped() -> list[str]:
    """Strict score by category for every model and split that was measured."""
    found = list(latest(rows(METRICS), "model", "split", "nfe", "guidance").values())
    first = found[0]
    categories = list(first["categories"])
    intro = (
        f"Strict score (everything right, or 0) on {first['n']} prompts, one picture each. The combinations of "
        "held-out prompts never occur in training; those of `val` do. Evaluations (NFE) are counted; a guidance pair "
        "is two, and guidance 1 is none."
    )
    command = f"`tdm-serve eval MODEL --split SPLIT --n {first['n']} --results {METRICS.relative_to(ROOT)}`"
    body = [
        [f"`{row['model']}`", row["split"], str(row["nfe"]), f"{row['guidance']:g}", f"**{row['strict']:.3f}**"]
        + [f"{row['soft']:.3f}"]
        + [f"{row['categories'][name]['strict']:.2f}" for name in categories]
        for row in sorted(found, key=lambda row: (row["split"], -row["nfe"]))
    ]
    header = ["model", "split", "NFE", "guidance", "all", "soft", *(name.replace("_", " ") for name in categories)]
    return section("## Quality", intro, table(header, body), source=f"{command}; {machine(first)}.")


def against_nfe() -> list[Row]:
    """The newest row of every model, guidance and count of evaluations, in that order."""
    newest = latest(results("quality"), "model", "nfe", "guidance").values()
    return sorted(newest, key=lambda row: (list(METHODS).index(row["model"]), row["nfe"], row["guidance"]))


def score_table(found: Sequence[Row]) -> list[str]:
    """One line a row."""
    body = [
        [
            f"`{row['model']}`",
            str(row["nfe"]) + (" (untrained)" if row["untrained"] else ""),
            f"{row['guidance']:g}",
            f"**{row['strict']:.3f}**",
            f"{row['strict_low']:.3f} to {row['strict_high']:.3f}",
            f"{row['soft']:.3f}",
        ]
        for row in found
    ]
    return table(["model", "NFE", "guidance", "strict", "95 % interval", "soft"], body)


def nfe() -> list[str]:
    """The score of teacher, TDM and TDM-R1 at several counts of evaluations."""
    found = against_nfe()
    if not found:
        return []
    intro = (
        f"Strict score on {found[0]['n']} prompts, one picture each. *Untrained* counts are those that a student was "
        "not trained for; hollow in the plot."
    )
    return section(
        "## Score against network evaluations",
        intro,
        plot("nfe", "Strict score of teacher, TDM and TDM-R1 against network evaluations"),
        score_table(found),
        source=f"`python benchmarks/quality.py --keep`; {machine(*found)}.",
    )


def short() -> list[str]:
    """The README's picture of the same."""
    found = against_nfe()
    if not found:
        return []
    caption = (
        f"*Strict score on {found[0]['n']} prompts. Hollow points are counts that a student was not trained for "
        "(table in `docs/benchmarks.md`).*"
    )
    return [*plot("nfe", "Strict score against network evaluations", "docs/plots"), "", caption, ""]
