"""The scene checker as a reward: soft, strict, and likes that a noisy judge would give.

All three read metadata["spec"], a `tdm_finetune.scenes.Spec` or the mapping that it becomes on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from tdm_finetune import scenes
from tdm_finetune.rewards.base import BadSample, Metadata, Reward
from tdm_finetune.scenes import Spec, Thing, Verdict
from tdm_serve.errors import ConfigError


def soft() -> Reward:
    """The checker's soft score in [0, 1]: the mean of what a prompt asks for (`tdm_finetune.scenes.check`)."""
    return _each(lambda verdict: verdict.soft)


def strict() -> Reward:
    """1 where the picture shows exactly what the prompt asks for, else 0."""
    return _each(lambda verdict: float(verdict.strict))


def likes(threshold: float = 0.9, temperature: float = 0.05, seed: int = 0) -> Reward:
    """Thumbs up (1) or down (0), as a noisy judge would give them.

    like = 1 with probability sigmoid((soft - threshold) / temperature), the Bradley-Terry form of a judge who compares
    a picture with a standard. The draw comes from a hash of the seed, the pixels and the prompt: the same judge says
    the same of the same picture, whatever the batch, the process or the order.
    """
    if not temperature > 0:
        raise ConfigError(f"scenes-likes: temperature is {temperature}; it must be above 0")
    return Judge(threshold, temperature, seed)


@dataclass(frozen=True, slots=True)
class Judge:
    """The noisy judge of `likes`."""

    threshold: float
    temperature: float
    seed: int

    def probability(self, soft_score: float) -> float:
        """Of a like."""
        return 1.0 / (1.0 + math.exp(-(soft_score - self.threshold) / self.temperature))

    def draw(self, picture: Tensor, prompt: str) -> float:
        """A number in [0, 1), the same for the same picture and prompt."""
        content = blake2b(f"{self.seed}/{prompt}/".encode(), digest_size=8)
        content.update(picture.contiguous().numpy().tobytes())
        return int.from_bytes(content.digest()) / 2**64

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        scores = soft()(images, prompts, metadata).tolist()
        draws = [self.draw(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor([float(d < self.probability(s)) for d, s in zip(draws, scores, strict=True)])


def spec_of(index: int, metadata: Metadata) -> Spec:
    """The scene specification of a sample; BadSample if there is none."""
    spec: Any = metadata.get("spec")
    if isinstance(spec, Spec):
        return spec
    if not isinstance(spec, Mapping):
        raise BadSample(index, f"its metadata has no scene under 'spec', only {sorted(metadata) or 'nothing'}")
    try:
        fields: dict[str, Any] = {**spec}
        things = tuple(Thing(**thing) for thing in fields.pop("things", ()))
        return Spec(things=things, **fields)
    except (TypeError, ValueError) as error:
        raise BadSample(index, f"its metadata has no valid scene under 'spec': {error}") from error


def _each(value: Callable[[Verdict], float]) -> Reward:
    def reward(images: Tensor, _prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        if tuple(images.shape[1:3]) != (scenes.SIZE, scenes.SIZE):
            raise ValueError(f"pictures are {tuple(images.shape[1:3])}; scenes are {scenes.SIZE} x {scenes.SIZE}")
        pairs = zip(images.numpy(), metadata, strict=True)
        return torch.tensor([value(scenes.check(p, spec_of(i, data))) for i, (p, data) in enumerate(pairs)])

    return reward
