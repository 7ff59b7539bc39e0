"""Pictures of a trainee's prompts by any of its networks, and their scores: for previews, pre-training, experiments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdm_finetune.monitor import health
from tdm_finetune.rollout import Predict, guided, rollout
from tdm_finetune.scoring import mean, score_pictures
from tdm_finetune.trainee import Conditioning, Prompt, Trainee
from tdm_serve.errors import ConfigError

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (latents, level, what `encode` gives) -> output
CHUNK = 64  # pictures at a time


@torch.no_grad()
def paint(
    trainee: Trainee,
    network: Network,
    texts: Sequence[str],
    *,
    nfe: int,
    guidance: float = 1.0,
    seed: int = 0,
    eta: float = 0.0,
) -> Tensor:
    """uint8 pictures (B, H, W, 3) in `nfe` steps; a guided step is two evaluations, and guidance 1 is off.

    A picture's noise is a function of `seed` and its place alone. `eta` above 0 re-noises at every step.
    """
    device = next(trainee.net.parameters()).device
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(texts), *trainee.latent_shape, generator=random)
    fresh = torch.randn(nfe, *noise.shape, generator=random) if eta > 0 else None
    pictures: list[Tensor] = []
    for first in range(0, len(texts), CHUNK):
        chosen = texts[first : first + CHUNK]
        said, nothing = (_on(device, trainee.encode(prompts)) for prompts in (chosen, [""] * len(chosen)))
        predict = guided(_with(network, said), _with(network, nothing), guidance)
        part = slice(first, first + CHUNK)
        renewed = None if fresh is None else fresh[:, part].to(device)
        trajectory = rollout(predict, trainee.process, noise[part].to(device), nfe, eta, renewed)
        pictures.append(trainee.decode(trajectory.states[-1]))
    return torch.cat(pictures)


def _on(device: torch.device, conditioning: Conditioning) -> Conditioning:
    return tuple(tensor.to(device) for tensor in conditioning)


def _with(network: Network, conditioning: Conditioning) -> Predict:
    return lambda latents, level: network(latents, level, conditioning)


def evaluations(nfe: int, guidance: float) -> int:
    """Network evaluations a picture."""
    return nfe if guidance == 1.0 else 2 * nfe


def score_network(
    trainee: Trainee,
    network: Network,
    *,
    split: str,
    n: int,
    nfe: int,
    guidance: float = 1.0,
    seed: int = 0,
    eta: float = 0.0,
    repeats: tuple[int, int] = (16, 8),
) -> dict[str, Any]:
    """A JSON-ready row: one picture for each of the first `n` prompts of a split, and `repeats` for the diversity.

    Raises ConfigError for a model whose world has no checker.
    """
    if trainee.world is None:
        raise ConfigError("this model's world has no exact checker, so there is nothing to score it with")
    prompts: list[Prompt] = list(islice(trainee.prompts(split, seed), n))
    started = time.perf_counter()
    pictures = paint(trainee, network, [p.text for p in prompts], nfe=nfe, guidance=guidance, seed=seed, eta=eta)
    seconds = time.perf_counter() - started
    several = [prompt.text for prompt in prompts[: repeats[0]] for _ in range(repeats[1])]
    again = paint(trainee, network, several, nfe=nfe, guidance=guidance, seed=seed + 1, eta=eta)
    found = score_pictures(
        pictures.numpy(), prompts, world=trainee.world, repeats=again.numpy().reshape(-1, repeats[1], *again.shape[1:])
    )
    return {
        "split": split,
        "nfe": evaluations(nfe, guidance),
        "guidance": guidance,
        "seconds": round(seconds, 2),
        **found.row(trainee.world.categories),
    }


def quick_scores(trainee: Trainee, prompts: Sequence[Prompt], pictures: Tensor, seeds: int) -> dict[str, float]:
    """What a training log keeps: strict and soft where the world has a checker, and the pictures' health.

    Every `seeds` pictures in a row are of one prompt.
    """
    world = trainee.world
    if world is None or any("spec" not in prompt.metadata for prompt in prompts):
        return health(pictures, palette=None, seeds=seeds)
    grades = world.check(pictures.numpy(), [prompt.spec for prompt in prompts])
    scores = {"strict": mean(grade.strict for grade in grades), "soft": mean(grade.soft for grade in grades)}
    return scores | health(pictures, palette=world.palette, seeds=seeds)


def sheet(pictures: Tensor, columns: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures (B, H, W, 3) in rows; an incomplete last row is left out unless it is the only one."""
    columns = min(columns, len(pictures))
    rows = pictures[: len(pictures) // columns * columns].numpy()
    _, height, width, _ = rows.shape
    grid = rows.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(-1, columns * width, 3))
