"""A synthetic world with exact rewards: prompts, true pictures, and a checker that needs no detector."""

from tdm_finetune.scenes.check import Seen, Verdict, check, look
from tdm_finetune.scenes.prompts import ScenePrompt, phrase, prompts
from tdm_finetune.scenes.render import render
from tdm_finetune.scenes.world import (
    BACKGROUND,
    CATEGORIES,
    COLOURS,
    SHAPES,
    SIZE,
    SPLITS,
    Category,
    Spec,
    Split,
    Thing,
)

__all__ = [
    "BACKGROUND",
    "CATEGORIES",
    "COLOURS",
    "SHAPES",
    "SIZE",
    "SPLITS",
    "Category",
    "ScenePrompt",
    "Seen",
    "Spec",
    "Split",
    "Thing",
    "Verdict",
    "check",
    "look",
    "phrase",
    "prompts",
    "render",
]
