"""How far people's ratings go: which groups of rated pictures a training run could use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST = 2  # rated pictures that make a group


@dataclass(frozen=True, slots=True)
class Groups:
    """Rated pictures of one checkpoint; those of a group differ in nothing but the seed."""

    pictures: int
    groups: int
    usable: int  # groups of LEAST or more pictures that are not all rated alike


def count_groups(records: Iterable[Mapping[str, Any]], checkpoint: str) -> Groups:
    """What the trainer would find in these records (`tdm-serve feedback export` writes them), by the trainer's rule.

    The rating of a picture is the mean of its records. A group in which all ratings are alike teaches nothing.
    """
    groups: dict[tuple[Any, ...], dict[int, list[bool]]] = {}
    for record in records:
        if record["checkpoint_hash"] == checkpoint:
            same = (record["prompt"], record["size"], str(record.get("sigmas")), record.get("guidance"))
            groups.setdefault(same, {}).setdefault(record["seed"], []).append(record["like"])
    means = [[sum(likes) / len(likes) for likes in pictures.values()] for pictures in groups.values()]
    usable = [group for group in means if len(group) >= LEAST and len(set(group)) > 1]
    return Groups(sum(map(len, means)), len(means), len(usable))
