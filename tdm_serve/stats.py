"""What an engine has done so far, as plain numbers: the raw data of a metrics page. No torch, no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STAGE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ERROR_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)  # |actual - promised| / actual


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of the rest."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds
    total: float  # the sum of all values


class Tally:
    """A histogram that grows. Not thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Histogram:
        """What was counted so far."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of an engine. Counters never fall; everything in a mapping has its label as key."""

    ready: bool
    degraded: str | None
    waiting: int  # pictures accepted and not started
    running: int  # pictures started and not finished
    backlog_ms: float  # predicted, until everything accepted is done
    accepted: int  # tickets
    finished: int  # tickets that got their pictures
    cancelled: int  # tickets called off by their owner
    failed: Mapping[str, int]  # tickets by reason: an error's class in snake case, such as out_of_device_memory
    refused: Mapping[str, int]  # tickets by reason: queue_full, deadline, too_slow, invalid, closed, failed, hung
    images: Mapping[str, int]  # pictures by model
    evaluations: Mapping[str, int]  # of one picture by the network, by model
    steps: int  # batched evaluations
    batch_fill: Mapping[int, int]  # steps by the number of pictures in them
    stage_seconds: Mapping[str, Histogram]  # of one batch: text, denoise, decode
    eta_error: Histogram  # relative to the actual time, of finished tickets
    restarts: int  # of the device thread
    hangs: int  # runs that took far longer than predicted
    cache_hits: int = 0  # of the prompt cache
    cache_misses: int = 0
    cache_bytes: int = 0
    version_loads: int = 0  # times that a version's own weights came into memory, and left it
    version_unloads: int = 0
    version_bytes: Mapping[str, int] = field(default_factory=dict[str, int])  # of those in memory, beside the base
    memory_bytes: Mapping[str, int] = field(default_factory=dict[str, int])  # of the device: allocated, reserved


@dataclass(frozen=True, slots=True)
class WarmShape:
    """A size that is warm, and what it is predicted to take."""

    width: int
    height: int
    text: int  # padded prompt length in tokens
    guided: bool
    best_batch: int  # pictures in a step at the highest throughput
    alone_ms: Mapping[str, float]  # one picture on an idle device, by model, at the model's own number of steps
