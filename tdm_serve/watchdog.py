"""Whether the device hangs: a run that takes far longer than anything that was predicted for it.

Nothing can stop a call into a driver that never returns. What can be done is to say so: the service is not ready any
more, new requests are refused at once, deadlines of those that wait are kept. When the run returns after all, it all
goes on. What runs before serving, such as the warm-up, is not watched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tdm_serve.core import Shape
from tdm_serve.errors import ConfigError
from tdm_serve.scheduler import Costs, Stage

logger = logging.getLogger(__name__)

HANG_S = 60.0
TIMES_PREDICTED = 20.0
COMPILE_S = 3600.0  # for a run of a kind that has to be compiled first
LOOKS = 20  # within the least time, so that a hang is noticed soon after it is one
LONGEST_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Doing:
    """A run of the device: so many pictures of one shape and so many versions."""

    stage: Stage
    shape: Shape
    pictures: int
    models: int = 1

    def expected_ms(self, costs: Costs) -> float:
        """What it is predicted to take, if no prompt is cached."""
        if self.stage is Stage.START:
            return costs.start_ms(self.shape, self.pictures, 0)
        if self.stage is Stage.STEP:
            return costs.step_ms(self.shape, self.pictures, self.models)
        return costs.finish_ms(self.shape, self.pictures)

    def __str__(self) -> str:
        return f"{self.stage} of {self.pictures} {'picture' if self.pictures == 1 else 'pictures'} of {self.shape}"


class Watch:
    """One run after the other, held against what was predicted. Not thread-safe: the desk's lock guards it."""

    def __init__(self, hang_s: float | None = None, *, compiles: bool = False) -> None:
        """A run hangs beyond `hang_s` and TIMES_PREDICTED its prediction, whichever is longer; None is never.

        `compiles` gives COMPILE_S to the first run of each kind.
        """
        if hang_s is not None and not 0 < hang_s < float("inf"):
            raise ConfigError(f"hang_s is {hang_s}; it must be a positive number of seconds, or none")
        self.hang_s = hang_s
        self.hung: str | None = None
        self._compiles, self._known = compiles, set[Doing]()
        self._doing: Doing | None = None
        self._began_ms = self._limit_ms = 0.0

    def begins(self, doing: Doing, predicted_ms: float, now_ms: float) -> None:
        """A run begins."""
        if self.hang_s is None:
            return
        compiling = self._compiles and doing not in self._known
        least_ms = 1000 * max(self.hang_s, COMPILE_S if compiling else 0.0)
        self._doing, self._began_ms = doing, now_ms
        self._limit_ms = max(least_ms, TIMES_PREDICTED * predicted_ms)

    def ends(self, now_ms: float) -> bool:
        """The run is over; whether it had been taken for hung, so that its time says nothing about others."""
        doing, hung = self._doing, self.hung is not None
        if doing is not None and self._compiles:
            self._known.add(doing)
        if hung:
            logger.warning("the device is back: %s took %.0f s", doing, (now_ms - self._began_ms) / 1000)
        self._doing = self.hung = None
        return hung

    def look(self, now_ms: float) -> bool:
        """True once for each run that has taken too long; `hung` then says what."""
        if self._doing is None or self.hung is not None or now_ms - self._began_ms <= self._limit_ms:
            return False
        self.hung = f"the device hangs: {self._doing} is not done after {self._limit_ms / 1000:.3g} s"
        logger.error("%s; nothing new is accepted until it is", self.hung)
        return True


class Watchdog:
    """A thread that calls `look` again and again, from `start` to `close`. None where nothing is watched."""

    def __init__(self, hang_s: float | None, look: Callable[[], None]) -> None:
        self._tick_s = None if hang_s is None else min(LONGEST_TICK_S, hang_s / LOOKS)
        self._look = look
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tdm-serve watchdog", daemon=True)

    def start(self) -> None:
        if self._tick_s is not None:
            self._thread.start()

    def close(self) -> None:
        """Any number of times."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._tick_s):
            self._look()
