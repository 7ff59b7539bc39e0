"""What a reward is, and the checks that every score passes before training sees it.

A reward is a plain callable. It looks at a batch but judges each picture for itself: how a batch is cut into pieces
must not change a score. What it returns is checked here, because a wrong length or a NaN that reaches the advantages
spoils a run without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdm_serve.errors import RewardError, TdmServeError

Metadata = Mapping[str, Any]
# images uint8 (B, H, W, 3) on the CPU, prompts (B), metadata (B) -> float (B,)
Reward = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Tensor]


class BadSample(ValueError):
    """A sample that a reward cannot judge. `index` counts within the batch that the reward was given."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


@dataclass(frozen=True, slots=True)
class Part:
    """One reward of a mixture. `label` is its name, numbered where the same name comes twice."""

    label: str
    weight: float
    reward: Reward


@dataclass(frozen=True, slots=True)
class Scores:
    """The weighted sum (B,) and each part's own scores (B,), unweighted; float32 on the CPU."""

    total: Tensor
    parts: Mapping[str, Tensor]


def score(
    part: Part, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], *, first: int = 0
) -> Tensor:
    """The part's scores as float32 (B,) on the CPU; `first` is the place of images[0] in the caller's batch.

    Raises RewardError that names the reward, and the sample where one is at fault.
    """
    try:
        with torch.no_grad():
            result: Any = part.reward(images, prompts, metadata)
    except BadSample as error:
        sample = name_sample(first + error.index, prompts[error.index])
        raise RewardError(f"the reward {part.label!r} cannot judge {sample}: {error}") from error
    except TdmServeError as error:
        raise RewardError(f"the reward {part.label!r} failed on {_span(first, prompts)}: {error}") from error
    except Exception as error:  # whatever somebody's reward raises must not end a worker unseen
        problem = f"{type(error).__name__}: {error}"
        raise RewardError(f"the reward {part.label!r} failed on {_span(first, prompts)}: {problem}") from error
    return _checked(part.label, result, prompts, first)


def weighted(parts: Sequence[Part], scores: Mapping[str, Tensor]) -> Scores:
    """The parts' scores and their weighted sum."""
    stacked = torch.stack([scores[part.label] for part in parts])  # (P, B)
    weights = torch.tensor([part.weight for part in parts])
    return Scores(weights @ stacked, dict(scores))


def check_batch(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Raises ValueError unless the arguments are a batch; that is the caller's doing, not a reward's."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3 or images.device.type != "cpu":
        kind = f"{images.dtype} {tuple(images.shape)} on {images.device}"
        raise ValueError(f"images are {kind}; rewards take uint8 (B, H, W, 3) on the CPU")
    if not len(images) == len(prompts) == len(metadata) > 0:
        raise ValueError(
            f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; give equal counts"
        )


def name_sample(index: int, prompt: str) -> str:
    """How errors point at a sample."""
    return f"sample {index} ({prompt!r})"


def _span(first: int, prompts: Sequence[str]) -> str:
    if len(prompts) == 1:
        return name_sample(first, prompts[0])
    return f"samples {first} to {first + len(prompts) - 1} (the first is {prompts[0]!r})"


def _checked(label: str, result: Any, prompts: Sequence[str], first: int) -> Tensor:
    where = _span(first, prompts)
    if not isinstance(result, Tensor):
        kind = type(result).__name__
        raise RewardError(f"the reward {label!r} returned a {kind} for {where}; it must return a float tensor (B,)")
    if not result.is_floating_point():
        raise RewardError(
            f"the reward {label!r} returned {result.dtype} for {where}; it must return a float tensor (B,)"
        )
    if result.shape != (len(prompts),):
        wanted = f"it must return one score each, a tensor of shape ({len(prompts)},)"
        raise RewardError(f"the reward {label!r} returned shape {tuple(result.shape)} for {where}; {wanted}")
    scores = result.detach().to("cpu", torch.float32)
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        sample = name_sample(first + index, prompts[index])
        raise RewardError(f"the reward {label!r} returned {scores[index].item()} for {sample}; scores must be finite")
    return scores
