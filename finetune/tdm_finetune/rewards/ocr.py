"""How much of the asked-for text can be read in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_finetune.rewards.base import BadSample, Metadata, Reward
from tdm_finetune.rewards.readers import Layout, Reader, paddle, tesseract
from tdm_finetune.scenes.check import edit_distance

BARS = str.maketrans({"|": "l", "i": "l", "1": "l"})  # after lower-casing


def ocr(
    reader: Literal["tesseract", "paddle"] = "tesseract",
    layout: Layout = "line",
    language: str = "eng",
    fold_bars: bool = False,
    processes: int | None = None,
) -> Reward:
    """1 - edit distance / length of the wanted text, in [0, 1]; see `similarity`.

    `layout` "line" crops to one line of text and enlarges it, as the scenes need it; "page" reads the whole picture.
    `language` is a code of the reader's own. `fold_bars` takes I, l, 1 and | for one letter, which sans-serif fonts
    draw alike (the published reward does not). `processes` of Tesseract run side by side, by default one per core.
    Raises ConfigError where the reader is not installed.
    """
    read = tesseract(layout, language, processes) if reader == "tesseract" else paddle(layout, language)
    return reward_from(read, fold_bars=fold_bars)


def reward_from(read: Reader, *, fold_bars: bool = False) -> Reward:
    """The reward over any reader of pictures uint8 (B, H, W, 3) to B texts."""

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        wanted = [target(i, p, data) for i, (p, data) in enumerate(zip(prompts, metadata, strict=True))]
        texts = read(images.numpy())
        return torch.tensor([similarity(t, w, fold_bars=fold_bars) for t, w in zip(texts, wanted, strict=True)])

    return reward


def target(index: int, prompt: str, metadata: Metadata) -> str:
    """The text between the prompt's first two double quotes, else the scene's word; BadSample if there is neither."""
    quoted = prompt.split('"')
    if len(quoted) >= 3 and _plain(quoted[1]):
        return quoted[1]
    spec: Any = metadata.get("spec")
    word: Any = spec.get("word") if isinstance(spec, Mapping) else getattr(spec, "word", None)
    if not word:
        raise BadSample(index, 'it asks for no text: no "quoted" words in the prompt, no word in its scene')
    return str(word)


def similarity(recognised: str, wanted: str, *, fold_bars: bool = False) -> float:
    """r = 1 - d / len(wanted), both lower-cased and without spaces.

    d = 0 if `wanted` is part of `recognised`, else their Levenshtein distance, at most len(wanted). So text around the
    wanted one costs nothing, as in the OCR reward of Flow-GRPO (Liu et al. 2025) and the DGPO and TDM-R1 trainers.
    Unlike there, a reader that breaks is an error and no score of 0.
    """
    found, goal = _plain(recognised), _plain(wanted)
    if fold_bars:
        found, goal = found.translate(BARS), goal.translate(BARS)
    if goal in found:
        return 1.0
    return 1.0 - min(edit_distance(found, goal), len(goal)) / len(goal)


def _plain(text: str) -> str:
    return "".join(text.lower().split())
