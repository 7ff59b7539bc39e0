"""Kernels and full-size models on GPUs. Where no GPU has measured them there are no rows, and so no sections."""

from __future__ import annotations

from report_tables import Row, latest, machine, results, section, spread, table


def kernels() -> list[str]:
    """The newest row of each card: every operation's contenders by shape, and the targets."""
    blocks: list[list[str]] = []
    for row in latest_cards("kernels"):
        ceilings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row["ceilings"].items())
        body = [
            [
                one["operation"],
                shape(one),
                f"`{name}`",
                spread(times, 3),
            ]
            for one in row["rows"]
            for name, times in sorted(one["contenders"].items(), key=lambda item: item[1]["p50"])
        ]
        goals = [[one["target"], str(one["measured"]), str(one["wanted"]), one["verdict"]] for one in row["targets"]]
        blocks += [
            [f"{machine(row)}. Ceilings: {ceilings}."],
            table(["operation", "shape", "contender", "ms (p20 to p80)"], body),
            table(["target", "measured", "wanted", "verdict"], goals),
        ]
    intro = "Medians with a cold L2 cache; each is compared with the plain definition before it is timed."
    return section("## Kernels", intro, *blocks) if blocks else []


def shape(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row["shape"].items())


def full_size() -> list[str]:
    """Published models with random weights: one line a model, type, size and batch."""
    found = list(latest(results("fullsize"), "model", "quantise", "size", "batch").values())
    if not found:
        return []
    body = [
        [f"`{row['model']}`", one["backend"], row["dtype"] if row["quantise"] == "none" else row["quantise"]]
        + [f"{one['width']}x{one['height']}", str(one["batch"]), str(one["nfe"])]
        + [f"{one['ms'][stage]:.1f}" for stage in ("text", "denoise", "decode", "png", "total")]
        + [f"{one['images_per_second']:.2f}", f"{one['memory_mb'] / 1024:.1f}"]
        for row in found
        for one in row["rows"]
    ]
    header = ["model", "backend", "type", "size", "batch", "NFE", "text", "denoise", "decode", "png", "total, ms"]
    intro = "Random weights: pictures are noise, time and memory depend on shapes alone. Medians of a batch."
    source = f"`python benchmarks/fullsize.py --keep`; {machine(*found)}."
    return section("## Full size", intro, table([*header, "images/s", "GB"], body), source=source)


def latest_cards(name: str) -> list[Row]:
    newest = {row["machine"]["device"]: row for row in results(name)}
    return list(newest.values())
