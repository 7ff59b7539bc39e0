"""The measured cost table of one device: (stage, shape, batch, versions) -> milliseconds. What admission rests on.

Pure data: whoever runs the device measures and calls `observe`; nothing here reads a clock. Not thread-safe.

What was not measured is estimated, on the safe side where it matters:
- between two measured batches: on the line between them; above the largest: its milliseconds a picture;
  below the smallest: as dear as the smallest;
- a shape that was never run: the nearest measured one, scaled by what the stage's work grows with: text tokens for
  the encoder, image and text tokens for an evaluation (16 pixels a side each, twice with guidance), pixels for the
  decoder;
- several versions in one batch: as dear as a whole batch for each, so that only what was measured is ever mixed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tdm_serve.core import Shape
from tdm_serve.errors import ConfigError
from tdm_serve.files import write_atomically
from tdm_serve.scheduler.nouns import Stage

FORMAT = 1  # of the file; another one is measured again
UNMEASURED_MS = 100.0  # a stage of which nothing at all is known
TOLERANCE = 0.03  # a smaller batch is preferred unless a larger one gives this much more pictures a second
WINDOW = 5  # first samples, of which the median is taken
WEIGHT = 0.02  # of each later sample in the moving average; the scheduler's calibration follows what is brief
BOUND = 1.5  # a sample is taken as at most so many times the average and at least one over it


@dataclass(frozen=True, slots=True)
class Device:
    """What timings depend on beside shape and batch. A profile of another device is not used."""

    name: str
    threads: int
    dtype: str
    backend: str
    checkpoint: str  # hash


@dataclass(slots=True)
class Entry:
    """One cell of the table: the median of the first samples, then a moving average that a stall spoils little.

    An average, since queues add times up: a machine that is now and then slower has a mean above its median.
    """

    ms: float = 0.0
    first: list[float] = field(default_factory=list[float])

    def add(self, ms: float) -> None:
        if len(self.first) < WINDOW:
            self.first.append(ms)
            self.ms = statistics.median_low(self.first)
        else:
            self.ms += WEIGHT * (min(max(ms, self.ms / BOUND), self.ms * BOUND) - self.ms)


class Profile:
    """Costs of runs on one device; `scheduler.Costs` is its view of it."""

    def __init__(self, device: Device, steps: int = 4) -> None:
        """`steps` is how many evaluations a picture usually takes; it weighs the stages in `best_batch`."""
        if steps < 1:
            raise ConfigError(f"A picture of {steps} steps cannot be profiled; it takes at least 1")
        self.device = device
        self._steps = steps
        self._table: dict[tuple[Stage, Shape, int], dict[int, Entry]] = {}  # (stage, shape, versions) -> by batch
        self._limits: dict[Shape, int] = {}  # largest batch that fits in memory, where that is known
        self._estimates: dict[tuple[Stage, Shape, int, int], float] = {}
        self._best: dict[Shape, int] = {}

    def observe(self, stage: Stage, shape: Shape, batch: int, ms: float, models: int = 1) -> None:
        """Adds a sample: `batch` pictures took `ms`. START counts what it encoded, not what was cached."""
        self._check(stage, batch, ms, models)
        self._table.setdefault((stage, shape, models), {}).setdefault(batch, Entry()).add(ms)
        self._estimates.clear()
        self._best.clear()

    def limit_batch(self, shape: Shape, batch: int) -> None:
        """Says that no more than `batch` pictures of this shape fit in memory."""
        if batch < 1:
            raise ConfigError(f"A limit of {batch} pictures of {shape} leaves nothing to run; it must be at least 1")
        self._limits[shape] = min(batch, self._limits.get(shape, batch))
        self._best.clear()

    def start_ms(self, shape: Shape, pictures: int, cached: int) -> float:
        """Encoding the prompts that are not cached; 0 where all are, unless a batch of 0 was measured."""
        fresh = pictures - cached
        return self._estimate(Stage.START, shape, fresh, 1) if fresh else self._nothing_ms(shape)

    def step_ms(self, shape: Shape, pictures: int, models: int = 1) -> float:
        """One evaluation of a batch of `pictures` in which there are `models` versions."""
        return self._estimate(Stage.STEP, shape, pictures, models)

    def finish_ms(self, shape: Shape, pictures: int) -> float:
        """Decoding a batch."""
        return self._estimate(Stage.FINISH, shape, pictures, 1)

    def best_batch(self, shape: Shape) -> int:
        """The smallest measured batch whose pictures a second, all stages together, are within 3 % of the most."""
        if shape not in self._best:
            self._best[shape] = self._find_best(shape)
        return self._best[shape]

    def alone_ms(self, shape: Shape, steps: int | None = None) -> float:
        """One picture with the device to itself."""
        steps = self._steps if steps is None else steps
        return self.start_ms(shape, 1, 0) + steps * self.step_ms(shape, 1) + self.finish_ms(shape, 1)

    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of which an evaluation was measured, smallest first."""
        found = {shape for stage, shape, _ in self._table if stage is Stage.STEP}
        return tuple(sorted(found, key=lambda shape: (_size(Stage.STEP, shape), str(shape))))

    def batches(self, shape: Shape, stage: Stage = Stage.STEP, models: int = 1) -> tuple[int, ...]:
        """Batches that were measured, smallest first."""
        return tuple(sorted(self._table.get((stage, shape, models), ())))

    def save(self, path: Path) -> None:
        """Writes the table; raises OutputError where that is not possible."""
        rows = [
            {"stage": stage.value, "shape": asdict(shape), "models": models, "batch": batch, "ms": entry.ms}
            for (stage, shape, models), entries in self._table.items()
            for batch, entry in entries.items()
        ]
        limits = [{"shape": asdict(shape), "batch": batch} for shape, batch in self._limits.items()]
        data = {"format": FORMAT, "device": asdict(self.device), "entries": rows, "limits": limits}
        write_atomically(path, json.dumps(data, indent=1).encode())

    @classmethod
    def load(cls, path: Path, device: Device, steps: int = 4) -> Profile:
        """What was saved for this device; an empty profile where the file is absent or of another device or format.

        Raises ConfigError for a file that is no profile.
        """
        profile = cls(device, steps)
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return profile
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no profile of tdm-serve: {error}; delete it to measure again") from error
        try:
            if data["format"] == FORMAT and data["device"] == asdict(device):
                profile._fill(data)
        except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
            message = f"{path} is no profile of tdm-serve: {type(error).__name__} {error}; delete it to measure again"
            raise ConfigError(message) from error
        return profile

    def _fill(self, data: dict[str, Any]) -> None:
        for row in data["entries"]:
            self.observe(Stage(row["stage"]), Shape(**row["shape"]), row["batch"], row["ms"], row["models"])
        for row in data["limits"]:
            self.limit_batch(Shape(**row["shape"]), row["batch"])

    @staticmethod
    def _check(stage: Stage, batch: int, ms: float, models: int) -> None:
        if batch < (0 if stage is Stage.START else 1):
            raise ConfigError(f"A {stage} batch of {batch} cannot be measured; it holds at least 1 picture")
        if not 0 < ms < math.inf:
            raise ConfigError(f"A {stage} batch of {batch} took {ms} ms; a duration is greater than 0, and finite")
        if not 1 <= models <= max(1, batch):
            raise ConfigError(f"A batch of {batch} has {models} versions; it has at least 1 and at most one a picture")

    def _nothing_ms(self, shape: Shape) -> float:
        entry = self._table.get((Stage.START, shape, 1), {}).get(0)
        return entry.ms if entry else 0.0

    def _find_best(self, shape: Shape) -> int:
        limit = self._limits.get(shape, 1 << 30)
        batches = [batch for batch in self.batches(shape) if batch <= limit]
        if not batches:
            near = self._nearest(Stage.STEP, shape, 1)
            if near is None or near == shape:
                return 1
            growth = max(1.0, _size(Stage.STEP, shape) / _size(Stage.STEP, near))
            return max(1, min(limit, int(self.best_batch(near) / growth)))
        rates = {batch: batch / self._pass_ms(shape, batch) for batch in batches}
        enough = max(rates.values()) * (1 - TOLERANCE)
        return min(batch for batch in batches if rates[batch] >= enough)

    def _pass_ms(self, shape: Shape, batch: int) -> float:
        """A batch from the prompts to the pictures."""
        denoise = self._steps * self.step_ms(shape, batch)
        return self.start_ms(shape, batch, 0) + denoise + self.finish_ms(shape, batch)

    def _estimate(self, stage: Stage, shape: Shape, batch: int, models: int) -> float:
        key = (stage, shape, batch, models)
        if key not in self._estimates:
            self._estimates[key] = self._look_up(stage, shape, batch, models)
        return self._estimates[key]

    def _look_up(self, stage: Stage, shape: Shape, batch: int, models: int) -> float:
        near = self._nearest(stage, shape, models)
        if near is None:
            return models * self._estimate(stage, shape, batch, 1) if models > 1 else UNMEASURED_MS * batch
        growth = _size(stage, shape) / _size(stage, near)
        entries = self._table[stage, near, models]
        return growth * _interpolate([(known, entries[known].ms) for known in sorted(entries) if known], batch)

    def _nearest(self, stage: Stage, shape: Shape, models: int) -> Shape | None:
        """The measured shape whose work is nearest in ratio. Mixed batches are not carried over to other shapes."""
        size = _size(stage, shape)
        known = {key[1]: entries for key, entries in self._table.items() if key[0] is stage and key[2] == models}
        if shape in known and any(known[shape]):
            return shape
        if models > 1:
            return None
        usable = [other for other, entries in known.items() if any(entries)]
        return min(usable, key=lambda other: (abs(math.log(_size(stage, other) / size)), str(other)), default=None)


def _size(stage: Stage, shape: Shape) -> float:
    """What the work of a stage grows with."""
    pixels = shape.width * shape.height
    passes = 2 if shape.guided else 1
    if stage is Stage.START:
        return max(1, shape.text) * passes
    return (pixels / 256 + shape.text) * passes if stage is Stage.STEP else pixels


def _interpolate(points: Iterable[tuple[int, float]], batch: int) -> float:
    """On the lines between `points` (batch, ms), which are sorted; the module says what is done outside."""
    points = list(points)
    if batch <= points[0][0]:
        return points[0][1]
    for (low, low_ms), (high, high_ms) in pairwise(points):
        if batch <= high:
            return low_ms + (high_ms - low_ms) * (batch - low) / (high - low)
    return points[-1][1] * batch / points[-1][0]
