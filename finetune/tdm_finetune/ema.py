"""Exponential moving average of trainable tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def warm_up(step: int) -> float:
    """So that early steps do not linger."""
    return (1 + step) / (10 + step)


class Ema:
    """Averages with decay min(decay, ramp(step))."""

    def __init__(self, live: Mapping[str, Tensor], decay: float, ramp: Callable[[int], float] = warm_up) -> None:
        self.decay, self.ramp = decay, ramp
        self._live = live
        self._average = {name: p.detach().clone() for name, p in live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, self.ramp(step))
        for name, parameter in self._live.items():
            self._average[name].lerp_(parameter, 1.0 - decay)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Puts the averaged values in place for the duration of a block."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self._average.items():
            value.copy_(state[name])
