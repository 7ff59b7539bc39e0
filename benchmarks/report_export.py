"""Exported engines beside eager torch, the decoder's memory layouts, and the engine in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_tables import Row, latest, machine, results, section, spread, table

STAGES = ("text", "denoise", "decode", "total")
EAGER = "eager"


def engines() -> list[str]:
    """Milliseconds of the newest run by batch and engine, and what the engines weigh and score."""
    found = results("export")
    if not found:
        return []
    row = found[-1]
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    intro = (
        f"`{row['model']}` at {row['size']}, {row['nfe']} evaluations, prompts not cached, {threads}, sides in turn, "
        f"{row['repeats']} rounds. Milliseconds are medians of a batch, the last column eager's time over theirs, "
        "round by round: median, p20 and p80. Scores are strict, by the exact checker, before and after."
    )
    command = f"`python benchmarks/export.py ENGINE ... --keep`; {machine(row)}."
    return section("## Exported engines", intro, speeds(row), facts(row), source=command)


def inside() -> list[str]:
    """The same in docs/export.md, under its own heading."""
    return engines()[2:]


def speeds(row: Row) -> list[str]:
    body = [
        [batch, name, *(f"{stages[stage]['p50']:.1f}" for stage in STAGES), over(row, batch, name)]
        for batch, sides in row["milliseconds"].items()
        for name, stages in sides.items()
    ]
    return table(["batch", "", *STAGES, "eager over it"], body)


def over(row: Row, batch: str, name: str) -> str:
    return "" if name == EAGER else f"{spread(row['eager_over'][batch][name])}x"


def facts(row: Row) -> list[str]:
    body = [
        [name, f"{sum(one['mb'].values()):.1f}", *score(one), str(row["largest_difference"][name])]
        for name, one in row["engines"].items()
    ]
    return table(["engine", "MB", "score before", "after", "largest difference of 255"], body)


def score(engine: Row) -> list[str]:
    found = engine["score"]
    return [f"{found[when]:.3f}" for when in ("before", "after")] if found else ["", ""]


def decoder() -> list[str]:
    """Channels-last beside contiguous convolutions."""
    found = list(latest(results("decoder"), "vae", "size", "dtype").values())
    if not found:
        return []
    body = [
        [f"`{row['vae']}`", row["size"], row["dtype"]]
        + [f"{row['milliseconds'][name]['p50']:.1f}" for name in ("channels-last", "contiguous")]
        + [f"{spread(row['contiguous_over_channels_last'])}x"]
        for row in found
    ]
    header = ["autoencoder", "size", "type", "channels-last, ms", "contiguous, ms", "contiguous over channels-last"]
    intro = "The decoder alone in both memory layouts, in turn; medians, and the ratio of the rounds with p20 and p80."
    return section("## Decoder", intro, table(header, body), source=_by("decoder", found))


def previews() -> list[str]:
    """What streams cost."""
    found = results("previews")
    if not found:
        return []
    row = found[-1]
    body = [
        [name, spread(rate, 1), spread(row["share_of_none"][name]) if name in row["share_of_none"] else ""]
        for name, rate in row["pictures_per_second"].items()
    ]
    intro = (
        f"{row['clients']} clients that ask for streams with a preview after each evaluation, in turn with those that "
        "ask for none; medians with p20 and p80."
    )
    header = ["previews", "pictures/s", "of none's, round by round"]
    return section("## Previews", intro, table(header, body), source=_by("previews", [row]))


def web() -> list[str]:
    """An int8 engine in headless Chromium."""
    found = results("web")
    if not found:
        return []
    row: Any = found[-1]
    body = [
        [
            threads,
            f"{one['load_s']:.2f}",
            f"{one['first_picture_s']:.3f}",
            spread(one["picture_s"], 3),
            f"{one['peak_mb']} ({one['empty_page_peak_mb']} when empty)",
        ]
        for threads, one in row["threads"].items()
    ]
    intro = (
        f"`examples/web`: an int8 engine of `{row['model']}` at {row['size']}, {row['nfe']} evaluations, in headless "
        f"Chromium; {row['megabytes']['total']} MB to fetch, {row['megabytes']['gzip']} compressed."
    )
    header = ["threads", "load, s", "first picture, s", "picture, s", "peak MB"]
    return section("## In a browser", intro, table(header, body), source=_by("web", [row]))


def _by(name: str, found: Sequence[Row]) -> str:
    return f"`python benchmarks/{name}.py --keep`; {machine(*found)}."
