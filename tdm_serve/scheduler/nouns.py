"""What the scheduler is told and what it answers. Times are float milliseconds of one clock, which the caller reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from tdm_serve.core import Shape
from tdm_serve.errors import ConfigError


class Stage(StrEnum):
    """What a picture needs next: its prompt encoded, one network evaluation, or its latents decoded."""

    START = "text"
    STEP = "denoise"
    FINISH = "decode"


@dataclass(frozen=True, slots=True)
class Work:
    """One picture of a ticket. A ticket's pictures share tenant, priority and deadline."""

    id: int
    ticket: int
    shape: Shape
    model: str
    steps: int
    arrived_ms: float
    deadline_ms: float | None = None  # a moment, not a duration
    priority: int = 0  # higher goes first
    tenant: str = ""
    cached: bool = False  # the prompt's embedding is at hand, so START is nearly free


@dataclass(frozen=True, slots=True)
class Run:
    """What the device does next: one stage of pictures of one shape."""

    stage: Stage
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do until `until_ms`; None is until something is offered."""

    until_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Promise:
    """Accepted: all pictures of the ticket are there in `eta_ms` from now, behind `position` other pictures."""

    eta_ms: float
    position: int


Reason = Literal["queue_full", "deadline", "too_slow"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not accepted. Offered again after `retry_after_ms` it is, unless others come first.

    A deadline that is shorter than the pictures take on an idle device can never be met, whatever the wait.
    """

    reason: Reason
    retry_after_ms: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished ticket: what was promised for it and what it took, in ms since it was accepted."""

    ticket: int
    promised_ms: float
    actual_ms: float


class Costs(Protocol):
    """What runs cost on this device, in ms of wall time."""

    def start_ms(self, shape: Shape, pictures: int, cached: int) -> float:
        """Encoding `pictures` prompts, of which `cached` have been encoded before."""
        ...

    def step_ms(self, shape: Shape, pictures: int, models: int) -> float:
        """One network evaluation of a batch in which there are `models` different versions."""
        ...

    def finish_ms(self, shape: Shape, pictures: int) -> float:
        """Decoding a batch."""
        ...

    def best_batch(self, shape: Shape) -> int:
        """The batch with the most pictures a second that fits in memory."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """What the scheduler may do to whom. The defaults suit an interactive service."""

    max_waiting: int = 256  # pictures that have not begun
    max_wait_ms: float = 60_000.0  # no ETA beyond this is promised
    max_batch: int = 64  # cap on the measured best batch
    slack: float = 0.08  # part of an ETA by which later arrivals may delay what was promised
    deadline_margin: float = 0.05  # a deadline is accepted only with this part of the ETA to spare
    aging_ms: float = 500.0  # what one level of priority is worth in waiting
    fair_share: float = 0.5  # part of what a tenant queued beyond its share by which others may delay it
    weights: Mapping[str, float] = field(default_factory=dict[str, float])  # shares of tenants; 1 where not named
    refresh_ms: float = 200.0  # how old a forecast may be for answers that need no exact one

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.max_wait_ms > 0:
            raise ConfigError(f"max_wait_ms is {self.max_wait_ms}; it must be greater than 0")
        for name in ("slack", "deadline_margin", "aging_ms", "fair_share", "refresh_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more, and finite")
        for tenant, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"The weight of tenant {tenant!r} is {weight}; it must be greater than 0, and finite")
