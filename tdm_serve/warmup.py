"""Warming a device up, and measuring its profile on the way: what every stage costs at which batch.

Batches grow 1, 2, 4, ... until a larger one gives no more pictures a second, does not fit the memory, or would take too
long to try. A profile that was stored earlier for the same device is kept where a quick look at each shape agrees with
it. Passes are timed after one that is thrown away, which pays for whatever is done once per shape; of several the
quickest counts, since a busy machine only ever makes them slower.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from tdm_serve.core import Request, Shape
from tdm_serve.device import Device, Underway
from tdm_serve.errors import ConfigError, OutputError, PromptTooLong
from tdm_serve.isolate import forget_frames
from tdm_serve.profile import TOLERANCE, Profile
from tdm_serve.profile import Device as Identity
from tdm_serve.scheduler import Stage

logger = logging.getLogger(__name__)

MOST_STEPS = 3  # evaluations of one pass; the sampler's other ones cost the same
BUDGET_S = 20.0  # for trying larger batches, per shape
AGREES = 1.5  # a stored time is kept when a new one is at most this much more or less
WORDS = ("a", "red", "circle", "above", "two", "small", "blue", "squares", "and", "one", "green", "star")


@dataclass(frozen=True, slots=True)
class Pass:
    """Milliseconds of one batch from prompts to pictures; an evaluation is the quickest of a few."""

    start_ms: float
    step_ms: float
    finish_ms: float

    def picture_ms(self, batch: int, steps: int) -> float:
        """Of one picture of the batch."""
        return (self.start_ms + steps * self.step_ms + self.finish_ms) / batch

    def best(self, other: Pass) -> Pass:
        """The quicker stages of two passes."""
        return Pass(*map(min, astuple(self), astuple(other)))


class WarmUp:
    """Runs in the device thread. `stopping` ends it early, between two passes."""

    def __init__(
        self,
        device: Device,
        shapes: Sequence[Shape],
        max_batch: int,
        stopping: Callable[[], bool],
        every_batch: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`every_batch` runs each size up to the best one, for backends that compile each. `clock` is in seconds."""
        self._device = device
        self._shapes = shapes
        self._max_batch = max_batch
        self._stopping = stopping
        self._every_batch = every_batch
        self._clock = clock
        self._numbers = itertools.count()
        self._words = 1  # of the last prompt: the next one's search begins there
        self._models = tuple(device.infos)
        self._steps = len(device.infos[self._models[0]].sigmas)

    def run(self, stored: Profile) -> Profile:
        """The stored profile where it still holds for all shapes, else a new one."""
        profile = stored
        if not all(self._holds(stored, shape) for shape in self._shapes):
            profile = Profile(stored.device, self._steps)
            for shape in self._shapes:
                self._measure(profile, shape)
        if self._every_batch:
            for shape in self._shapes:
                self._run_each(shape, min(profile.best_batch(shape), self._max_batch))
        return profile

    def _run_each(self, shape: Shape, largest: int) -> None:
        for batch in range(1, largest + 1):
            if self._stopping() or self._if_it_fits(shape, batch, self._fitting(shape)[:1]) is None:
                return

    def _holds(self, stored: Profile, shape: Shape) -> bool:
        """One look at the smallest and at the best batch. True where nothing must be measured."""
        known = stored.batches(shape)
        if 1 not in known:
            return False
        for batch in {1, min(stored.best_batch(shape), self._max_batch)}:
            found = self._passes(shape, batch)
            if found is None:
                return self._stopping()
            expected = Pass(
                stored.start_ms(shape, batch, 0), stored.step_ms(shape, batch), stored.finish_ms(shape, batch)
            )
            ratio = found.picture_ms(batch, self._steps) / expected.picture_ms(batch, self._steps)
            if not 1 / AGREES <= ratio <= AGREES:
                logger.info("the stored profile no longer holds for %s at batch %d; measuring anew", shape, batch)
                return False
            _note(stored, shape, batch, found)
        return True

    def _measure(self, profile: Profile, shape: Shape) -> None:
        began, batch, before_ms = self._clock(), 1, float("inf")
        while batch <= self._max_batch:
            found = self._passes(shape, batch)
            if found is None:
                if not self._stopping() and batch > 1:
                    profile.limit_batch(shape, batch // 2)
                return
            _note(profile, shape, batch, found)
            if batch > 1:
                self._mix(profile, shape, batch)
            now_ms = found.picture_ms(batch, self._steps)
            spent_s = self._clock() - began
            if now_ms > before_ms * (1 - TOLERANCE) or spent_s * 2 > BUDGET_S:
                return
            batch, before_ms = batch * 2, now_ms

    def _passes(self, shape: Shape, batch: int, models: Sequence[str] = ()) -> Pass | None:
        """The best of two passes after a first one; None when stopping, or when a batch is out of memory."""
        models = models or self._fitting(shape)[:1]
        timed: list[Pass] = []
        for _ in range(3):
            if self._stopping():
                return None
            if (found := self._if_it_fits(shape, batch, models)) is None:
                return None
            timed.append(found)
        return timed[1].best(timed[2])

    def _if_it_fits(self, shape: Shape, batch: int, models: Sequence[str]) -> Pass | None:
        """One pass; None when out of memory. A single picture must fit, or its shape cannot be served."""
        try:
            return self._pass(shape, batch, models)
        except Exception as error:
            if batch == 1 or not self._device.out_of_memory(error):
                raise
            forget_frames(error)
        logger.info("%d pictures of %s do not fit the device's memory", batch, shape)
        self._device.empty_cache()
        return None

    def _pass(self, shape: Shape, batch: int, models: Sequence[str]) -> Pass:
        requests = [
            Request(self._prompt(shape), number, shape.width, shape.height, guidance=_guidance(shape), model=model)
            for number, model in zip(range(batch), itertools.cycle(models), strict=False)
        ]
        began = self._clock()
        samples = self._device.start(requests)
        start_ms = self._since(began)
        step_ms = min(self._step(samples) for _ in range(min(MOST_STEPS, len(samples[0].rows))))
        began = self._clock()
        self._device.finish(samples)
        return Pass(start_ms, step_ms, self._since(began))

    def _step(self, samples: Sequence[Underway]) -> float:
        began = self._clock()
        self._device.step(samples)
        return self._since(began)

    def _since(self, began: float) -> float:
        return (self._clock() - began) * 1000

    def _mix(self, profile: Profile, shape: Shape, batch: int) -> None:
        """Evaluations of a batch with several versions in it."""
        models = self._fitting(shape)
        for count in range(2, min(len(models), batch) + 1):
            if found := self._passes(shape, batch, models[:count]):
                profile.observe(Stage.STEP, shape, batch, found.step_ms, count)

    def _fitting(self, shape: Shape) -> list[str]:
        """Versions that make pictures of a shape by their own settings; else all."""
        infos = self._device.infos
        return [name for name in infos if (infos[name].guidance != 1.0) == shape.guided] or list(infos)

    def _prompt(self, shape: Shape) -> str:
        """A prompt of the shape's length that was not used before, so that no cache knows it."""
        prompt, self._words = prompt_of(self._device, shape, f"{next(self._numbers)}", self._words)
        return prompt


def prompt_of(device: Device, shape: Shape, mark: str, words: int = 1) -> tuple[str, int]:
    """A prompt that begins with `mark` and is padded to the shape's text length, and how many words it has.

    The search begins at `words` words. Raises ConfigError where there is no such prompt.
    """
    tried: set[int] = set()
    while words >= 1 and words not in tried:
        tried.add(words)
        prompt = " ".join(itertools.islice(itertools.cycle(WORDS), words))
        text = _text_length(device, shape, f"{mark} {prompt}")
        if text == shape.text:
            return f"{mark} {prompt}", words
        words += 1 if text < shape.text else -1
    raise ConfigError(f"no prompt has the padded length of {shape.text} tokens that was to be warmed up")


def _text_length(device: Device, shape: Shape, prompt: str) -> float:
    request = Request(prompt, 0, shape.width, shape.height, guidance=_guidance(shape))
    try:
        return device.check(request).text
    except PromptTooLong:
        return math.inf


def shape_of(device: Device, size: Shape | tuple[int, int]) -> Shape:
    """A size stands for the shape of a short prompt by the first version. Raises InvalidRequest for a wrong size."""
    if isinstance(size, Shape):
        return size
    return device.check(Request("a red circle", 0, *size))


def profile_path(given: Path | None, device: Identity) -> Path:
    """Each device has its own file in a folder: the one given, the state folder, or the user's cache folder."""
    if given is not None and given.suffix == ".json":
        return given
    digest = hashlib.sha256(json.dumps(asdict(device), sort_keys=True).encode()).hexdigest()[:16]
    if given is None:
        state = os.environ.get("TDM_SERVE_STATE_DIR")
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        given = Path(state) if state else Path(cache) / "tdm-serve"
    return given / f"profile-{digest}.json"


def load_profile(path: Path, device: Identity, steps: int) -> Profile:
    """What was stored for the device; an empty profile where there is none, or none that can be read."""
    try:
        return Profile.load(path, device, steps)
    except ConfigError as error:
        logger.warning("%s", error)
        return Profile(device, steps)


def save_profile(profile: Profile, path: Path) -> None:
    """Stores it if that is possible: serving does not depend on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
    except (OSError, OutputError) as error:
        logger.warning("the profile is not kept: %s", error)


def _guidance(shape: Shape) -> float:
    return 2.0 if shape.guided else 1.0


def _note(profile: Profile, shape: Shape, batch: int, found: Pass) -> None:
    profile.observe(Stage.START, shape, batch, found.start_ms)
    profile.observe(Stage.STEP, shape, batch, found.step_ms)
    profile.observe(Stage.FINISH, shape, batch, found.finish_ms)
