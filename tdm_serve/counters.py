"""What an engine counts while it runs. Not thread-safe: the desk's lock guards it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from tdm_serve.errors import Cancelled
from tdm_serve.scheduler import Stage
from tdm_serve.stats import ERROR_BOUNDS, STAGE_BOUNDS_S, Tally
from tdm_serve.ticket import Outcome


class Counters:
    """The moving side of `EngineStats`, whose field names these are."""

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = 0
        self.cancelled = 0
        self.restarts = 0
        self.hangs = 0
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.images: Counter[str] = Counter()
        self.evaluations: Counter[str] = Counter()
        self.batch_fill: Counter[int] = Counter()
        self.stage_seconds: defaultdict[str, Tally] = defaultdict(lambda: Tally(STAGE_BOUNDS_S))
        self.eta_error = Tally(ERROR_BOUNDS)

    def snapshot(self) -> dict[str, Any]:
        """All of it by the field names of `EngineStats`."""
        return {
            "accepted": self.accepted,
            "finished": self.finished,
            "cancelled": self.cancelled,
            "restarts": self.restarts,
            "hangs": self.hangs,
            "refused": dict(self.refused),
            "failed": dict(self.failed),
            "images": dict(self.images),
            "evaluations": dict(self.evaluations),
            "steps": self.batch_fill.total(),
            "batch_fill": dict(self.batch_fill),
            "stage_seconds": {stage: tally.snapshot() for stage, tally in self.stage_seconds.items()},
            "eta_error": self.eta_error.snapshot(),
        }

    def ran(self, stage: Stage, pictures: int, ms: float, evaluations: Iterable[tuple[str, int]]) -> None:
        """One run of the device thread."""
        self.stage_seconds[str(stage)].add(ms / 1000)
        if stage is Stage.STEP:
            self.batch_fill[pictures] += 1
        for model, count in evaluations:
            self.evaluations[model] += count

    def made(self, model: str) -> None:
        """One picture."""
        self.images[model] += 1

    def settled(self, outcome: Outcome, promised_ms: float, actual_ms: float) -> None:
        """One ticket."""
        if isinstance(outcome, Cancelled):
            self.cancelled += 1
        elif isinstance(outcome, Exception):
            self.failed[snake_case(type(outcome).__name__)] += 1
        else:
            self.finished += 1
            self.eta_error.add(abs(actual_ms - promised_ms) / max(actual_ms, 1e-3))


def snake_case(name: str) -> str:
    """`OutOfDeviceMemory` as `out_of_device_memory`: how metrics label it."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
