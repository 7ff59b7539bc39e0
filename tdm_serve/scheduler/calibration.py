"""How much longer runs take than the table says: what the profile does not hold, such as the gaps between runs."""

from __future__ import annotations

from tdm_serve.scheduler.nouns import Stage

MEMORY = 0.97  # part of the past that stays with each run
CAUTION = 1.05  # the ratio before anything ran: promises of a rush's first second are else too good, and all late
BOUND = 2.0  # a ratio is taken as at most this and at least one over it, so that a stall spoils little

UP, DOWN = 0.1, 0.01  # steps of what is left free for company


class Calibration:
    """Actual over predicted by stage, as a ratio of sums that forget, so that long runs weigh more than short ones."""

    def __init__(self) -> None:
        self.ratios = dict.fromkeys(Stage, CAUTION)
        self._actual = dict.fromkeys(Stage, 0.0)
        self._predicted = dict.fromkeys(Stage, 0.0)

    def add(self, stage: Stage, predicted_ms: float, actual_ms: float) -> None:
        """A run for which the table said `predicted_ms`, uncorrected, took `actual_ms`."""
        if predicted_ms <= 0:
            return
        if not self._predicted[stage]:  # as if that ratio had held for a while
            self._predicted[stage] = predicted_ms * MEMORY / (1 - MEMORY)
            self._actual[stage] = self._predicted[stage] * CAUTION
        actual_ms = min(max(actual_ms, predicted_ms / BOUND), predicted_ms * BOUND)
        self._actual[stage] = MEMORY * self._actual[stage] + actual_ms
        self._predicted[stage] = MEMORY * self._predicted[stage] + predicted_ms
        self.ratios[stage] = self._actual[stage] / self._predicted[stage]


class Company:
    """How much of the room in their batches pictures find taken by later arrivals, as a part of it.

    A forecast without further arrivals is right for an idle device, and too good under load where large batches pay.
    Promises leave this part of the room free, so that arrivals can use it. It goes up while promises are used up, and
    down while they are not, and settles where about one in ten is.
    """

    def __init__(self) -> None:
        self.part = 0.0

    def add(self, room_ms: float, used_ms: float) -> None:
        """A ticket with `room_ms` in its batch came `used_ms` after what was forecast for it."""
        if room_ms > 0:
            change = UP if used_ms >= 0.95 * self.part * room_ms else -DOWN
            self.part = min(1.0, max(0.0, self.part + change))
