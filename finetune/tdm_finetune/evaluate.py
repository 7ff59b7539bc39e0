"""Scores a checkpoint on a split, with pictures made as they are served."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tdm_finetune import scenes
from tdm_finetune.data import chunks
from tdm_finetune.scenes import CATEGORIES, Category, ScenePrompt, Split, Verdict
from tdm_finetune.scoring import Scores, score_pictures
from tdm_serve import Pipeline
from tdm_serve.core import GeneratedImage, Request
from tdm_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A checkpoint's scores on a split, and what making the pictures cost."""

    model: str
    checkpoint_hash: str
    split: Split
    seed: int
    nfe: int  # counted, per picture
    guidance: float
    untrained_schedule: bool  # made in another number of steps than the checkpoint was trained for
    seconds: float  # of the scored pictures; those for the diversity are extra
    prompts: tuple[ScenePrompt, ...]
    quality: Scores

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The checker's, prompt by prompt."""
        return self.quality.grades

    def scores(self, category: Category | None = None) -> dict[str, float | int]:
        """Mean strict and soft score and the number of prompts, of one category or of all."""
        return self.quality.of(category)

    def summary(self) -> dict[str, Any]:
        """One JSON-ready row."""
        facts = ("model", "checkpoint_hash", "split", "seed", "nfe", "guidance")
        return {
            **self.scores(),
            **{name: getattr(self, name) for name in facts},
            **({"untrained_schedule": True} if self.untrained_schedule else {}),
            "seconds": round(self.seconds, 2),
            "threads": torch.get_num_threads(),
            **self.quality.row(CATEGORIES),
        }

    def table(self) -> str:
        """Category by strict and soft score and the second judge's, then the total, and what has no category."""
        lines = [f"{'category':<14}{'strict':>8}{'soft':>8}{'second':>8}{'n':>6}"]
        row = self.summary()
        seconds = row["second_judge_categories"] or {}
        for name, scores in (*row["categories"].items(), ("all", row)):
            second = row["second_judge"] if name == "all" else seconds.get(name)
            shown = "-" if second is None else f"{second:.3f}"
            lines.append(f"{name:<14}{scores['strict']:>8.3f}{scores['soft']:>8.3f}{shown:>8}{scores['n']:>6}")
        diversity = "not measured" if row["diversity"] is None else f"{row['diversity']:.3f}"
        lines.append(
            f"{self.nfe} evaluations a picture, guidance {self.guidance:g}, {self.seconds:.1f} s in all; "
            f"palette error {row['palette_error']:.5f}, diversity {diversity}"
        )
        return "\n".join(lines)


def evaluate(
    pipeline: Pipeline,
    split: Split,
    n: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    allow_untrained_schedule: bool = False,
    batch: int = 16,
    repeats: tuple[int, int] | None = (8, 8),
    second_judge: bool = True,
) -> Evaluation:
    """Makes one picture for each of the first `n` prompts of a split, seeds counted from `seed`, and scores it.

    `repeats` (prompts, seeds) are made besides, from the split's first prompts with seeds counted from `seed`, for the
    diversity; None leaves it out. Raises ConfigError or InvalidRequest for bad numbers, before the first picture.
    """
    _check_numbers(n, batch, repeats)
    again, others = repeats or (0, 0)
    prompts = tuple(islice(scenes.prompts(split, seed=seed), max(n, again)))

    def request(prompt: ScenePrompt, index: int) -> Request:
        return Request(
            prompt.text,
            seed + index,
            scenes.SIZE,
            scenes.SIZE,
            steps,
            guidance,
            allow_untrained_schedule=allow_untrained_schedule,
        )

    wanted = [request(prompt, index) for index, prompt in enumerate(prompts[:n])]
    repeated = [request(prompt, index) for prompt in prompts[:again] for index in range(others)]
    for one in (*wanted, *repeated):
        pipeline.check(one)
    started = time.perf_counter()
    images = _make(pipeline, wanted, batch, f"{split} prompts")
    seconds = time.perf_counter() - started
    groups = _pixels(_make(pipeline, repeated, batch, "for the diversity")) if repeats else None
    quality = score_pictures(
        _pixels(images),
        prompts[:n],
        repeats=None if groups is None else groups.reshape(again, others, *groups.shape[1:]),
        second_judge=second_judge,
    )
    info, first = pipeline.info, images[0]
    return Evaluation(
        info.id,
        info.checkpoint_hash,
        split,
        seed,
        first.nfe,
        first.guidance,
        first.untrained_schedule,
        seconds,
        prompts[:n],
        quality,
    )


def _check_numbers(n: int, batch: int, repeats: tuple[int, int] | None) -> None:
    numbers = [("n", n, 1), ("batch", batch, 1)]
    if repeats is not None:
        numbers += [("the number of repeated prompts", repeats[0], 1), ("the number of their seeds", repeats[1], 2)]
    for name, value, low in numbers:
        if value < low:
            raise ConfigError(f"{name} is {value}; it must be at least {low}")


def _make(pipeline: Pipeline, requests: Sequence[Request], batch: int, what: str) -> list[GeneratedImage]:
    images: list[GeneratedImage] = []
    for group in tqdm(list(chunks(requests, batch)), desc=what, disable=not sys.stderr.isatty()):
        images += pipeline.generate(group)
    return images


def _pixels(images: Sequence[GeneratedImage]) -> NDArray[np.uint8]:
    """(B, H, W, 3)."""
    return np.stack([np.asarray(image.image) for image in images])
