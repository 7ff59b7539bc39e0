"""Random numbers of one update as a function of (seed, update, group).

Every group of pictures has its own stream, so a draw does not depend on how groups are split over micro-batches or
processes, and an interrupted run has no generator state to save.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(*key: int) -> torch.Generator:
    """A generator for a key of non-negative integers; different keys give unrelated streams."""
    # NumPy fills short keys up with zeros, so (0, 1) and (0, 1, 0) would be the same
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class Draws:
    """Streams of several groups of `size` pictures. Each method draws once per group and joins: (B, ...)."""

    def __init__(self, streams: Sequence[torch.Generator], size: int, device: torch.device) -> None:
        self.streams, self.size, self.device = streams, size, device

    @classmethod
    def of(cls, seed: int, update: int, groups: Sequence[int], size: int, device: torch.device) -> Draws:
        return cls([stream(seed, update, group) for group in groups], size, device)

    def part(self, groups: slice) -> Draws:
        """The same streams for some of the groups."""
        return Draws(self.streams[groups], self.size, self.device)

    def normal(self, *shape: int) -> Tensor:
        """Independent for every picture."""
        return self._joined([torch.randn(self.size, *shape, generator=g) for g in self.streams])

    def shared_normal(self, *shape: int) -> Tensor:
        """The same for all pictures of a group."""
        return self._spread([torch.randn(1, *shape, generator=g) for g in self.streams])

    def uniform(self) -> Tensor:
        return self._joined([torch.rand(self.size, generator=g) for g in self.streams])

    def shared_uniform(self) -> Tensor:
        return self._spread([torch.rand(1, generator=g) for g in self.streams])

    def below(self, high: int) -> Tensor:
        """Integers 0 .. high - 1, independent for every picture."""
        return self._joined([torch.randint(high, (self.size,), generator=g) for g in self.streams])

    def shared_choice(self, weights: Tensor) -> Tensor:
        """An index by unnormalised `weights` (K,), the same for all pictures of a group."""
        return self._spread([torch.multinomial(weights, 1, generator=g) for g in self.streams])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self.device)

    def _spread(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).repeat_interleave(self.size, 0).to(self.device)
