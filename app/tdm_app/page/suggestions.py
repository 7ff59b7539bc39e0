"""Prompts of the kind that the embedded checkpoint was trained on, for people who rate and do not want to invent."""

from __future__ import annotations

import random

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
FORMS = ("circle", "square", "triangle", "star", "ring")
COUNTS = ("two", "three", "four")
PLACES = ("left of", "right of", "above", "below")
WORDS = ("CAT", "SUN", "GO", "HI", "TDM", "ART", "SEA")


def suggestion() -> str:
    """One of some thousands."""
    pick = random.SystemRandom().choice
    first, second = f"{pick(COLOURS)} {pick(FORMS)}", f"{pick(COLOURS)} {pick(FORMS)}"
    return pick((
        f"{pick(COUNTS)} {first}s",
        f"{_a(first)} {pick(PLACES)} {_a(second)}",
        f"{_a(first)} and {_a(second)}",
        f'the word "{pick(WORDS)}" in {pick(COLOURS)}',
    ))  # fmt: skip


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
