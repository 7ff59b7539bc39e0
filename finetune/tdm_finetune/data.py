"""Endless batches of true scenes, reproducible from a seed and a position."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tdm_finetune import scenes
from tdm_finetune.scenes import ScenePrompt
from tdm_finetune.scenes.render import Pixels

T = TypeVar("T")


def examples(seed: int, split: scenes.Split = "train") -> Iterator[tuple[ScenePrompt, Pixels]]:
    """Prompts of a split, each with one true picture."""
    rng = random.Random(f"render/{split}/{seed}")
    for prompt in scenes.prompts(split, seed=seed):
        yield prompt, scenes.render(prompt.spec, rng, allow_held_out=split == "heldout")


def to_tensor(pictures: list[Pixels]) -> Tensor:
    """uint8 pictures (H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
