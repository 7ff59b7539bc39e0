"""The engine behind asyncio: one thread owns the device, callers hold tickets, concurrent callers share batches."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tdm_serve.core import GeneratedImage, ModelInfo, Progress, Request, StepEvent, Terms
from tdm_serve.errors import Cancelled, ConfigError, EngineClosed, InvalidRequest, UnknownModel
from tdm_serve.pipeline import Pipeline, batch_key
from tdm_serve.scheduler import next_batch
from tdm_serve.stats import ERROR_BOUNDS, STAGE_BOUNDS_S, EngineStats, Tally, WarmShape
from tdm_serve.ticket import Mailbox, Outcome, Ticket, post

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    """The pictures of one ticket."""

    number: int
    mailbox: Mailbox
    images: list[GeneratedImage | None]
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """One queued picture."""

    request: Request
    group: _Group = field(repr=False)
    index: int

    @property
    def key(self) -> tuple[int, int, int | None, float | None]:
        return batch_key(self.request)


class AsyncEngine:
    """Queues requests for one pipeline. Create it anywhere; the rest runs in an event loop."""

    def __init__(self, pipeline: Pipeline, *, max_batch: int = 8) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}; it must be at least 1")
        self.info: ModelInfo = pipeline.info
        self.infos: Mapping[str, ModelInfo] = {pipeline.info.id: pipeline.info}
        self.ready = False
        self.degraded: str | None = None
        self._pipeline = pipeline
        self._max_batch = max_batch
        self._queue: deque[_Job] = deque()
        self._groups: dict[int, _Group] = {}
        self._running = 0
        self._picture_ms = 100.0
        self._numbers = itertools.count(1)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tdm-serve device", daemon=True)
        self._counts: Counter[str] = Counter()
        self._fill: Counter[int] = Counter()
        self._denoise, self._eta_error = Tally(STAGE_BOUNDS_S), Tally(ERROR_BOUNDS)

    async def start(self) -> None:
        """Starts the device thread and warms the default shape; `ready` is true afterwards."""
        self._thread.start()
        info = self.info
        await self.generate([Request("warm-up", 0, info.width, info.height)])
        self.ready = True

    def check(self, request: Request) -> None:
        """Raises InvalidRequest or UnknownModel for what `submit` would not take; queues nothing. Any thread."""
        if request.model not in ("", *self.infos):
            raise UnknownModel(f"model {request.model!r} is not served; allowed: {', '.join(self.infos)}")
        self._pipeline.check(request)

    def submit(self, requests: Sequence[Request], terms: Terms = Terms(), *, previews: bool = False) -> Ticket:  # noqa: ARG002, B008
        """Checks every request and queues all, or raises InvalidRequest, UnknownModel, Overloaded or EngineClosed."""
        for request in requests:
            self.check(request)
        if not requests:
            raise InvalidRequest("the list of requests is empty", param="n")
        group = _Group(next(self._numbers), Mailbox(asyncio.get_running_loop()), [None] * len(requests))
        with self._wake:
            if self._closing:
                raise EngineClosed("the server is shutting down and takes no new requests")
            self._queue.extend(_Job(request, group, index) for index, request in enumerate(requests))
            self._groups[group.number] = group
            self._counts["accepted"] += 1
            self._wake.notify()
        return Ticket(uuid.uuid4().hex, group.number, group.mailbox, self)

    async def generate(self, requests: Sequence[Request], terms: Terms = Terms()) -> list[GeneratedImage]:  # noqa: B008
        """Submits and waits. A cancelled caller cancels its pictures."""
        ticket = self.submit(requests, terms)
        try:
            return await ticket.result()
        finally:
            ticket.cancel()

    def cancel(self, number: int) -> bool:
        """What `Ticket.cancel` does."""
        with self._wake:
            group = self._groups.get(number)
            if group is None:
                return False
            self._counts["cancelled"] += 1
            self._queue = deque(job for job in self._queue if job.group is not group)
            self._settle(group, Cancelled("the request was cancelled"))
            return True

    def eta_ms(self, number: int) -> float:
        """What `Ticket.eta_ms` shows."""
        with self._wake:
            waiting = [job.group.number for job in self._queue]
            last = max((place for place, other in enumerate(waiting, 1) if other == number), default=0)
            return (last + self._running) * self._picture_ms

    def position(self, number: int) -> int:
        """What `Ticket.position` shows."""
        with self._wake:
            waiting = [job.group.number for job in self._queue]
            return waiting.index(number) + self._running if number in waiting else 0

    def stats(self) -> EngineStats:
        """What was done so far and is under way."""
        with self._wake:
            counts, model = self._counts, self.info.id
            return EngineStats(
                ready=self.ready,
                degraded=self.degraded,
                waiting=len(self._queue),
                running=self._running,
                backlog_ms=(len(self._queue) + self._running) * self._picture_ms,
                accepted=counts["accepted"],
                finished=counts["finished"],
                cancelled=counts["cancelled"],
                failed={},
                refused={},
                images={model: counts["images"]},
                evaluations={model: counts["evaluations"]},
                steps=self._fill.total(),
                batch_fill=dict(self._fill),
                stage_seconds={"denoise": self._denoise.snapshot()},
                eta_error=self._eta_error.snapshot(),
                restarts=0,
            )

    def capabilities(self) -> list[WarmShape]:
        """The warm shapes."""
        alone = {self.info.id: self._picture_ms}
        return [WarmShape(self.info.width, self.info.height, 32, self.info.guidance != 1.0, self._max_batch, alone)]

    async def close(self) -> None:
        """Finishes what is queued, then stops the thread."""
        self.ready = False
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _settle(self, group: _Group, outcome: Outcome) -> None:
        if group.outcome is None:
            group.outcome = outcome
            self._groups.pop(group.number, None)
            post([(group.mailbox, outcome)])

    def _run(self) -> None:
        while batch := self._take():
            self._make(batch)

    def _take(self) -> list[_Job]:
        """Waits for the next batch; empty only when closing and nothing is left."""
        with self._wake:
            while not self._queue and not self._closing:
                self._wake.wait()
            chosen = set(next_batch(self._queue, self._max_batch))
            batch = [job for index, job in enumerate(self._queue) if index in chosen]
            self._queue = deque(job for index, job in enumerate(self._queue) if index not in chosen)
            self._running = len(batch)
            return batch

    def _make(self, batch: Sequence[_Job]) -> None:
        """Runs a batch; whatever goes wrong reaches its callers and never ends the thread."""

        def tell(event: StepEvent) -> None:
            self._fill[len(batch)] += 1
            post([(job.group.mailbox, Progress(job.index, event.index + 1, event.total)) for job in batch])

        started = time.perf_counter()
        images: Sequence[GeneratedImage] = ()
        failure: Exception | None = None
        try:
            images = self._pipeline.generate([job.request for job in batch], tell)
        except Exception as error:
            logger.exception("a batch of %d failed", len(batch))
            failure = error
        with self._wake:
            self._running = 0
            if failure is None:
                self._picture_ms = (time.perf_counter() - started) * 1000 / len(batch)
            for job, image in itertools.zip_longest(batch, images):
                self._deliver(job, image, failure)

    def _deliver(self, job: _Job, image: GeneratedImage | None, failure: Exception | None) -> None:
        group = job.group
        if failure is not None or image is None:
            self._settle(group, failure or RuntimeError("no picture"))
            return
        group.images[job.index] = image
        self._counts["images"] += 1
        self._counts["evaluations"] += image.nfe
        done = [picture for picture in group.images if picture is not None]
        if len(done) == len(group.images):
            self._counts["finished"] += group.outcome is None
            self._settle(group, done)
