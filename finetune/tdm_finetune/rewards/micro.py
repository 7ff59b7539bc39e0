"""The micro world's exact checker as rewards: its soft score, its verdict, and likes that a noisy judge would give.

All read metadata["spec"], a `tdm_finetune.micro.world.Spec` or the mapping that it becomes on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdm_finetune.micro.check import Verdicts, check
from tdm_finetune.micro.world import Spec
from tdm_finetune.rewards.base import BadSample, Metadata, Reward
from tdm_finetune.rewards.scenes import Judge
from tdm_serve.errors import ConfigError


def soft() -> Reward:
    """Partial credit in [0, 1]; 1 exactly for a right picture."""

    def reward(images: Tensor, _prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return torch.from_numpy(_verdicts(images, metadata).soft).float()

    return reward


def strict() -> Reward:
    """1 for a right picture, 0 for any other."""

    def reward(images: Tensor, _prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return torch.from_numpy(_verdicts(images, metadata).strict).float()

    return reward


def likes(threshold: float = 0.9, temperature: float = 0.05, seed: int = 0) -> Reward:
    """Thumbs up (1) or down (0) by the same judge as the large world's `scenes-likes`, on the soft score here."""
    if not temperature > 0:
        raise ConfigError(f"micro-likes: temperature is {temperature}; it must be above 0")
    judge, scores = Judge(threshold, temperature, seed), soft()

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        chances = ((scores(images, prompts, metadata) - threshold) / temperature).sigmoid()
        draws = [judge.draw(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return (torch.tensor(draws) < chances).float()

    return reward


def _verdicts(images: Tensor, metadata: Sequence[Metadata]) -> Verdicts:
    return check(images.numpy(), [spec_of(index, known) for index, known in enumerate(metadata)])


def spec_of(index: int, metadata: Metadata) -> Spec:
    """The micro world's specification of a sample; BadSample if there is none."""
    spec: Any = metadata.get("spec")
    if isinstance(spec, Spec):
        return spec
    if not isinstance(spec, Mapping):
        raise BadSample(index, f"its metadata has no micro scene under 'spec', only {sorted(metadata) or 'nothing'}")
    try:
        fields: dict[str, Any] = {**spec}
        return Spec(colours=tuple(fields.pop("colours", ())), **fields)
    except (TypeError, ValueError) as error:
        raise BadSample(index, f"its metadata has no valid micro scene under 'spec': {error}") from error
