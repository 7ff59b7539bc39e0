"""The tables of docs/training.md: every method of the micro world, mistakes, words, and where an update's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_tables import latest, machine, results, table

LEVER = "lever-"  # how the tables of what was tried on one seed begin
WORTH_SHOWING = 0.1  # share of wrong pictures
HELPERS = ("surrogate-only",)  # tables that only prepare another one
REWARDS = {"micro": "soft", "micro-strict": "strict", "micro-likes": "likes"}


def of_world(name: str) -> dict[str, list[dict[str, Any]]]:
    """A world's rows of experiments by table, one a seed, in the file's order."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in results("experiments"):
        if row["world"] == name and row["split"] == "val":
            tables.setdefault(row["table"], []).append(row)
    return tables


def over_seeds(several: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    """Mean and, where there are several seeds, the range."""
    values = [row[name] for row in several]
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def experiment(several: Sequence[dict[str, Any]], label: str) -> list[str]:
    """One line of a table of experiments."""
    first = several[0]
    reward = REWARDS.get(first["reward"], first["reward"] or "")
    scores = [over_seeds(several, name, digits) for name, digits in (("strict", 3), ("soft", 3))]
    categories = [
        f"{sum(row['categories'][name]['strict'] for row in several) / len(several):.2f}"
        for name in first["categories"]
    ]
    palette = f"{1e3 * sum(row['palette_error'] for row in several) / len(several):.2f}"
    diversity = f"{sum(row['diversity'] for row in several) / len(several):.3f}"
    costs = [str(first["updates"]), f"{sum(row['train_seconds'] for row in several) / len(several):.0f}"]
    return [
        label,
        reward,
        str(first["nfe"]),
        str(len(several)),
        f"**{scores[0]}**",
        scores[1],
        *categories,
        palette,
        diversity,
        *costs,
    ]


def micro() -> list[str]:
    """All methods of the micro world, then the levers that were tried on one seed."""
    tables = of_world("micro")
    first = next(iter(tables.values()))[0]
    header = [
        "method",
        "reward",
        "NFE",
        "seeds",
        "strict",
        "soft",
        *first["categories"],
        "palette error x 1000",
        "diversity",
        "updates",
        "seconds",
    ]
    methods = [
        experiment(several, f"`{several[0]['method']}`")
        for key, several in tables.items()
        if not key.startswith(LEVER) and key not in HELPERS
    ]
    levers = [experiment([several[0]], f"`{key}`") for key, several in tables.items() if key.startswith(LEVER)]
    same = [experiment([tables[key][0]], f"`{key}`") for key in ("tdm-r1", "direct") if key in tables]
    seeds = sorted({row["seed"] for several in tables.values() for row in several})
    intro = (
        f"Scores on {first['n']} validation prompts, one picture each: the mean over the seeds and, in brackets, their "
        "range. Categories are strict. Updates and seconds are those after TDM (or of TDM), beside other work."
    )
    command = (
        f"`python benchmarks/experiments.py micro --seeds {','.join(map(str, seeds))} --keep`; "
        f"{machine(*(row for several in tables.values() for row in several))}."
    )
    tried = f"What was tried on seed {seeds[0]} alone, after that seed's `tdm-r1` and `direct` of the table above:"
    return [
        "### Every method",
        "",
        intro,
        "",
        *table(header, methods),
        "",
        command,
        "",
        tried,
        "",
        *table(header, same + levers),
        "",
    ]


def words() -> list[str]:
    """TDM-R1 with a reader's reward: words, which it was trained on, and the other categories."""
    tables = of_world("scenes")
    if not tables:
        return []
    body = [words_line(several[0]) for several in tables.values()]
    first = next(iter(tables.values()))[0]
    header = ["method", "reward", "text strict", "text soft", "text read", "others strict", "others second judge"]
    intro = (
        f"{first['n']} validation prompts. *Read* is the second judge's verdict on words, which is Tesseract's, too; "
        "the others are the six categories that were not trained on."
    )
    return [
        "### Words, rewarded by a reader",
        "",
        intro,
        "",
        *table([*header, "palette error x 1000", "diversity", "updates"], body),
        "",
        f"`python benchmarks/experiments.py scenes --keep`; {machine(next(reversed(tables.values()))[0])}.",
        "",
    ]


def words_line(row: dict[str, Any]) -> list[str]:
    categories, judged = row["categories"], row["second_judge_categories"]
    others = [name for name in categories if name != "text"]
    n = sum(categories[name]["n"] for name in others)
    strict = sum(categories[name]["strict"] * categories[name]["n"] for name in others) / n
    second = sum(judged[name] * categories[name]["n"] for name in others) / n
    text = categories["text"]
    scores = (text["strict"], text["soft"], judged["text"], strict, second)
    facts = [f"{1e3 * row['palette_error']:.2f}", f"{row['diversity']:.3f}", str(row["updates"])]
    return [f"`{row['method']}`", row["reward"] or "", *(f"{score:.3f}" for score in scores), *facts]


def mistakes() -> list[str]:
    """What wrong pictures of the embedded versions get wrong first."""
    found = results("errors")
    kinds = list(found[0]["errors"]["text"])
    body = [
        [f"`{row['model']}`", str(row["nfe"]), category.replace("_", " "), f"{sum(shares.values()):.2f}"]
        + [f"{shares[kind]:.2f}" for kind in kinds]
        for category in found[0]["errors"]
        for row in found
        if sum((shares := row["errors"][category]).values()) >= WORTH_SHOWING
    ]
    intro = (
        f"Shares of a category's pictures, {found[0]['n']} validation prompts; a picture counts for the first mistake "
        f"it makes, from left to right. Categories with less than {WORTH_SHOWING:.0%} wrong are left out. *Twice* is "
        "one of two things shown twice, and the other not."
    )
    command = f"`python benchmarks/errors.py --model MODEL --keep`; {machine(*found)}."
    header = ["model", "NFE", "category", "wrong", *kinds]
    return ["### What wrong pictures get wrong", "", intro, "", *table(header, body), "", command, ""]


def costs() -> list[str]:
    """Seconds, images a second and share of every phase of an update."""
    found = latest(results("training"), "method", "model")
    if not found:
        return []
    lines = ["### Where an update's time goes", ""]
    for (method, _), row in found.items():
        body = [
            [
                name,
                f"{seconds['p50']:.2f}",
                f"{row['images_per_second'].get(name, 0):.1f}",
                f"{row['share'].get(name, 1.0):.0%}",
            ]
            for name, seconds in row["seconds"].items()
        ]
        intro = (
            f"`{method}` on `{row['model']}`, {row['pictures']} pictures an update, {row['precision']}, "
            f"{row['memory_mb']} MB; {machine(row)}:"
        )
        lines += [intro, "", *table(["phase", "seconds (median)", "images/s", "share"], body), ""]
    return lines


def speed() -> list[str]:
    """The same in docs/benchmarks.md, without the document's own heading."""
    found = costs()
    return ["## Training", "", *found[2:]] if found else []
