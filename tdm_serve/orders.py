"""What the desk and the device thread hand each other: orders, their pictures, and what came of a run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tdm_serve.core import GeneratedImage, Progress, Request, Shape
from tdm_serve.device import Underway
from tdm_serve.scheduler import Work
from tdm_serve.ticket import Mailbox, Outcome


@dataclass(slots=True, eq=False)
class Order:
    """One ticket's pictures."""

    number: int
    mailbox: Mailbox
    previews: bool
    images: list[GeneratedImage | None]
    arrived_ms: float
    missing: int = 0
    outcome: Outcome | None = None
    items: list[Item] = field(default_factory=list["Item"])


@dataclass(slots=True, eq=False)
class Item:
    """One picture of an order. `sample` is there while it is being made; only the device thread touches it."""

    work: Work
    order: Order
    index: int
    request: Request
    sample: Underway | None = None


@dataclass(slots=True)
class Done:
    """What came of a run. `fresh` is how many prompts a start had to encode."""

    failed: list[tuple[Item, Exception]]
    images: list[tuple[Item, GeneratedImage]] = field(default_factory=list[tuple[Item, GeneratedImage]])
    progress: list[tuple[Item, Progress, object]] = field(default_factory=list[tuple[Item, Progress, object]])
    evaluations: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])  # by model
    fresh: int = 0
    fits: int | None = None  # a smaller batch that was tried because the whole one was out of memory
    ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was checked, and what the scheduler has to know of it."""

    request: Request
    shape: Shape
    model: str
    steps: int
    cached: bool


@dataclass(frozen=True, slots=True)
class Errand:
    """Something that only the device thread may do, such as loading a version. It is done between two runs."""

    work: Callable[[], Any]
    done: Future[Any]

    def run(self) -> None:
        """Its failure is its owner's; what is no Exception ends the thread as well."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self.work())
        except BaseException as error:
            self.done.set_exception(error)
            if not isinstance(error, Exception):
                raise
