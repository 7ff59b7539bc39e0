"""Where an update's time goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch

PREFIX = "seconds_"


class Clock:
    """Adds up wall-clock seconds by name; a GPU is waited for, or its time would show up in the next phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by name with a prefix."""
        taken = {PREFIX + name: seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken
