"""Latency by stage beside the peers of the same run, and the share of the roofline that each stage reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report_tables import Row, latest, machine, plot, results, section, spread, table

OURS = "tdm-serve"
OLD_RATIO = "diffusers_over_ours"  # of rows from before there were several peers


def newest() -> list[Row]:
    """The newest row of every size, batch and type, the smallest batch first."""
    found = latest(results("latency"), "size", "dtype", "batch")
    return [found[key] for key in sorted(found, key=str_key)]


def str_key(key: Sequence[Any]) -> tuple[str, str, int]:
    size, dtype, batch = key
    return str(size), str(dtype), int(batch)


def ratios(row: Row) -> Mapping[str, Mapping[str, float]]:
    """Of every peer's time over ours, round by round."""
    return row.get("ratios") or ({"diffusers": row[OLD_RATIO]} if OLD_RATIO in row else {})


def stages_table(row: Row) -> list[str]:
    """Median milliseconds of every contender by stage, and what its total is of ours."""
    stages = list(row["milliseconds"][OURS])
    body = [
        [name, *(f"{values[stage]['p50']:.1f}" if stage in values else "" for stage in stages), over(row, name)]
        for name, values in row["milliseconds"].items()
    ]
    return table(["", *stages, "over ours"], body)


def over(row: Row, name: str) -> str:
    found = ratios(row).get(name)
    return f"{spread(found)}x" if found and name != OURS else ""


def about(row: Row) -> str:
    return (
        f"Prompt to PNG, {row['size']}, batch {row['batch']}, {row['dtype']}, {row['nfe']} evaluations, text padded to "
        f"{row['text_tokens']} tokens; all in one process in turn, {row['repeats']} rounds, median milliseconds; "
        "the last column is the peer's total over ours, round by round: median, p20 and p80."
    )


def outcome(row: Row) -> str:
    return (
        f"The pictures differ by at most {row['largest_difference']} of 255. "
        f"`python benchmarks/latency.py --keep`; {machine(row)}."
    )


def short() -> list[str]:
    """The README's table: one picture at a time."""
    row = newest()[0]
    return section("## Latency", about(row), stages_table(row), source=outcome(row))


def latency() -> list[str]:
    """One table a size, type and batch."""
    found = newest()
    if not found:
        return []
    intro = (
        "Same weights, schedule, type, size and batch on all sides; before anything is timed they must make the same "
        "picture."
    )
    drawn = plot("latency", "Milliseconds a picture against batch") if len(found) > 1 else []
    blocks = [block for row in found for block in ([about(row)], stages_table(row), [outcome(row)])]
    return section("## Latency by stage", intro, drawn, *blocks)


def roofline() -> list[str]:
    """FLOPs and bytes of our stages, and what they reach of what the machine was measured to do."""
    found = [row for row in newest() if row.get("roofline")]
    if not found:
        return []
    intro = (
        "FLOPs and bytes are counted from the shapes; the ceilings, a large matrix product and a large copy, are "
        "measured on the same machine in the same run. The share is that of the time which the binding ceiling alone "
        "would take."
    )
    blocks = [block for row in found for block in ([ceilings(row)], shares(row))]
    drawn = plot("roofline", "Share of the roofline that each stage reaches")
    return section("## Share of the roofline", intro, drawn, *blocks, source=f"{machine(*found)}.")


def ceilings(row: Row) -> str:
    """Names say their unit: `matmul_gflops` becomes "matmul gflops"."""
    named = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row["ceilings"].items())
    return f"{row['size']}, batch {row['batch']}, {row['dtype']}. Ceilings: {named}."


def shares(row: Row) -> list[str]:
    body = [
        [stage, f"{one['flops'] / 1e9:.2f}", f"{one['bytes'] / 1e6:.1f}", one["bound"], f"{one['share']:.0%}"]
        for stage, one in row["roofline"].items()
    ]
    return table(["stage", "GFLOPs", "MB moved", "bound by", "share reached"], body)
