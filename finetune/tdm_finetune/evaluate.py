"""Scores pictures with the exact checker: quickly inside a training run, or a checkpoint on a whole split."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tdm_finetune import scenes
from tdm_finetune.cache import Frozen
from tdm_finetune.data import chunks
from tdm_finetune.rollout import conditional, guided, rollout
from tdm_finetune.scenes import CATEGORIES, Category, ScenePrompt, Split, Verdict
from tdm_finetune.scenes.render import Pixels
from tdm_serve import Pipeline
from tdm_serve.core import GeneratedImage, Request
from tdm_serve.errors import ConfigError
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.sampling import Row

QUICK_PROMPTS = 70


def quick_scores(
    denoiser: ZImageDenoiser,
    frozen: Frozen,
    rows: Sequence[Row],
    *,
    guidance: float,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Strict and soft score on the first validation prompts with fixed noise; optionally a sheet of the pictures."""
    chosen = list(islice(scenes.prompts("val", seed=0), QUICK_PROMPTS))
    pictures = sample(denoiser, frozen, [prompt.text for prompt in chosen], rows, guidance)
    verdicts = [scenes.check(picture, prompt.spec) for picture, prompt in zip(pictures, chosen, strict=True)]
    if sheet is not None:
        save_sheet(pictures, sheet, columns=7)
    return {"strict": _mean(v.strict for v in verdicts), "soft": _mean(v.soft for v in verdicts)}


@torch.no_grad()
def sample(
    denoiser: ZImageDenoiser, frozen: Frozen, prompts: list[str], rows: Sequence[Row], guidance: float, seed: int = 0
) -> list[Pixels]:
    """Pictures of `prompts` from fixed noise, in chunks of 35."""
    pictures: list[Pixels] = []
    generator = torch.Generator().manual_seed(seed)
    empty, empty_length = frozen.encode([""], 32)
    for chunk in chunks(prompts, 35):
        text, lengths = frozen.encode(list(chunk), 32)
        noise = torch.randn(len(chunk), frozen.channels, 16, 16, generator=generator)
        negative = conditional(denoiser, empty.expand_as(text), empty_length.expand_as(lengths))
        velocity = guided(conditional(denoiser, text, lengths), negative, guidance)
        pictures += list(frozen.to_pictures(rollout(velocity, noise, rows).states[-1]).numpy())
    return pictures


def save_sheet(pictures: Sequence[Pixels], path: Path, columns: int) -> None:
    """A contact sheet, row by row."""
    rows = [np.concatenate(list(row), axis=1) for row in chunks(pictures, columns) if len(row) == columns]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A checkpoint's verdicts on a split, prompt by prompt, and what making the pictures cost."""

    model: str
    checkpoint_hash: str
    split: Split
    seed: int
    nfe: int  # counted, per picture
    guidance: float
    seconds: float
    prompts: tuple[ScenePrompt, ...]
    verdicts: tuple[Verdict, ...]

    def scores(self, category: Category | None = None) -> dict[str, float | int]:
        """Mean strict and soft score and the number of prompts, of one category or of all."""
        chosen = [
            verdict
            for prompt, verdict in zip(self.prompts, self.verdicts, strict=True)
            if category in (None, prompt.spec.category)
        ]
        return {
            "strict": round(_mean(v.strict for v in chosen), 4),
            "soft": round(_mean(v.soft for v in chosen), 4),
            "n": len(chosen),
        }

    def summary(self) -> dict[str, Any]:
        """One JSON-ready row."""
        present = {prompt.spec.category for prompt in self.prompts}
        facts = ("model", "checkpoint_hash", "split", "seed", "nfe", "guidance")
        return {
            **self.scores(),
            **{name: getattr(self, name) for name in facts},
            "seconds": round(self.seconds, 2),
            "categories": {name: self.scores(name) for name in CATEGORIES if name in present},
        }

    def table(self) -> str:
        """Category by strict and soft score, then the total with evaluations and seconds."""
        lines = [f"{'category':<14}{'strict':>8}{'soft':>8}{'n':>6}"]
        summary = self.summary()
        for name, scores in (*summary["categories"].items(), ("all", summary)):
            lines.append(f"{name:<14}{scores['strict']:>8.3f}{scores['soft']:>8.3f}{scores['n']:>6}")
        lines.append(f"{self.nfe} evaluations a picture, guidance {self.guidance:g}, {self.seconds:.1f} s in all")
        return "\n".join(lines)


def evaluate(
    pipeline: Pipeline,
    split: Split,
    n: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
) -> Evaluation:
    """Makes one picture for each of the first `n` prompts of a split, seeds counted from `seed`, and checks it.

    Raises ConfigError or InvalidRequest for bad numbers, before the first picture.
    """
    for name, value in (("n", n), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    chosen = tuple(islice(scenes.prompts(split, seed=seed), n))
    size = scenes.SIZE
    requests = [Request(p.text, seed + i, size, size, steps, guidance) for i, p in enumerate(chosen)]
    for request in requests:
        pipeline.check(request)
    started = time.perf_counter()
    images: list[GeneratedImage] = []
    for group in tqdm(list(chunks(requests, batch)), desc=f"{split} prompts", disable=not sys.stderr.isatty()):
        images += pipeline.generate(group)
    seconds = time.perf_counter() - started
    verdicts = tuple(scenes.check(np.asarray(i.image), p.spec) for i, p in zip(images, chosen, strict=True))
    info = pipeline.info
    return Evaluation(
        info.id, info.checkpoint_hash, split, seed, images[0].nfe, images[0].guidance, seconds, chosen, verdicts
    )
