"""Costs by shape, looked up once per decision round and corrected by what runs really took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

from tdm_serve.core import Shape
from tdm_serve.scheduler.nouns import Costs, Stage

TOLERANCE = 0.03  # a smaller decoding batch is preferred unless a larger one gives this much more pictures a second

WORTHWHILE = 1.5  # full batches gain much where they do this much more than one by one


class Lane:
    """The pictures of one shape share a lane: an object, because comparing and hashing shapes is slow.

    All answers are remembered until `forget`, since forecasts ask thousands of times.
    """

    __slots__ = (
        "__weakref__",
        "_best",
        "_cap",
        "_costs",
        "_decodes",
        "_finish",
        "_mixed",
        "_passes",
        "_ratios",
        "_start",
        "_step",
        "shape",
    )

    def __init__(self, shape: Shape, costs: Costs, cap: int, ratios: Mapping[Stage, float]) -> None:
        self.shape = shape
        self._costs = costs
        self._cap = cap
        self._ratios = ratios
        self.forget()

    def forget(self) -> None:
        """Costs or corrections may have changed."""
        self._best = 0
        self._start: dict[tuple[int, int], float] = {}
        self._step: dict[int, float] = {}
        self._finish: dict[int, float] = {}
        self._decodes: dict[int, int] = {}
        self._passes: dict[tuple[int, int], float] = {}
        self._mixed: dict[tuple[int, ...], tuple[float, bool]] = {}

    @property
    def best(self) -> int:
        """The batch with the most pictures a second."""
        if not self._best:
            self._best = max(1, min(self._cap, self._costs.best_batch(self.shape)))
        return self._best

    def start(self, pictures: int, cached: int) -> float:
        """Encoding, in ms."""
        key = (pictures, cached)
        if key not in self._start:
            self._start[key] = self._costs.start_ms(self.shape, pictures, cached) * self._ratios[Stage.START]
        return self._start[key]

    def step(self, pictures: int) -> float:
        """One evaluation of one version, in ms."""
        if pictures not in self._step:
            self._step[pictures] = self._costs.step_ms(self.shape, pictures, 1) * self._ratios[Stage.STEP]
        return self._step[pictures]

    def finish(self, pictures: int) -> float:
        """Decoding, in ms."""
        if pictures not in self._finish:
            self._finish[pictures] = self._costs.finish_ms(self.shape, pictures) * self._ratios[Stage.FINISH]
        return self._finish[pictures]

    def mixed(self, counts: Sequence[int]) -> tuple[float, bool]:
        """One evaluation of several versions, `counts` pictures of each: its ms, and whether that beats one by one."""
        key = tuple(sorted(counts))
        if key not in self._mixed:
            ms = self._costs.step_ms(self.shape, sum(key), len(key)) * self._ratios[Stage.STEP]
            self._mixed[key] = ms, ms < sum(self.step(count) for count in key)
        return self._mixed[key]

    def decodes(self, ready: int) -> int:
        """How many of `ready` pictures to decode at once: few where that costs little, to have the first out early."""
        if ready not in self._decodes:
            each = [self.finish(count) / count for count in range(1, min(ready, self.best) + 1)]
            enough = min(each) * (1 + TOLERANCE)
            self._decodes[ready] = next(count for count, ms in enumerate(each, 1) if ms <= enough)
        return self._decodes[ready]

    def share_ms(self, steps: int) -> float:
        """What one more picture takes of the device under load."""
        best = self.best
        return (self.start(best, 0) + steps * self.step(best)) / best + self.finish(self.decodes(best)) / self.decodes(
            best
        )

    def service_ms(self, pictures: int, steps: int) -> float:
        """How long so many take on an idle device, at most."""
        full, rest = divmod(pictures, self.best)
        return full * self._pass_ms(self.best, steps) + (self._pass_ms(rest, steps) if rest else 0.0)

    def worthwhile(self, steps: int) -> bool:
        """Whether full batches gain so much that all may join, and promises leave room for company.

        Keeping others out would let the device fall behind there, and then every promise with it.
        """
        return self.best * self._pass_ms(1, steps) >= WORTHWHILE * self._pass_ms(self.best, steps)

    def company_ms(self, steps: int, own_ms: float) -> float:
        """How much longer than `own_ms` a picture takes in a full batch."""
        return max(0.0, self._pass_ms(self.best, steps) - own_ms)

    def _pass_ms(self, batch: int, steps: int) -> float:
        """A batch from prompts to pictures."""
        key = (batch, steps)
        if key not in self._passes:
            decodes = self.decodes(batch)
            decode = -(-batch // decodes) * self.finish(decodes)
            self._passes[key] = self.start(batch, 0) + steps * self.step(batch) + decode
        return self._passes[key]


class Lanes:
    """All lanes in use; one that no picture holds is dropped by itself."""

    def __init__(self, costs: Costs, cap: int, ratios: Mapping[Stage, float]) -> None:
        self._costs = costs
        self._cap = cap
        self._ratios = ratios
        self._lanes: WeakValueDictionary[Shape, Lane] = WeakValueDictionary()

    def of(self, shape: Shape) -> Lane:
        """The lane of a shape. Its answers are as fresh as the last `refresh`."""
        lane = self._lanes.get(shape)
        if lane is None:
            lane = self._lanes[shape] = Lane(shape, self._costs, self._cap, self._ratios)
        return lane

    def refresh(self) -> None:
        """Look everything up again."""
        for lane in self._lanes.values():
            lane.forget()
