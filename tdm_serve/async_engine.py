"""The engine behind asyncio: one thread owns the device, callers await futures, concurrent callers share batches."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from tdm_serve.core import GeneratedImage, ModelInfo, Request
from tdm_serve.errors import ConfigError, EngineClosed
from tdm_serve.pipeline import Pipeline, batch_key
from tdm_serve.scheduler import next_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    """One queued picture."""

    request: Request
    future: Future[GeneratedImage] = field(default_factory=Future[GeneratedImage])

    @property
    def key(self) -> tuple[int, int, int | None, float | None]:
        return batch_key(self.request)


class AsyncEngine:
    """Queues requests for one pipeline. Create it anywhere; `start`, `generate` and `close` run in an event loop."""

    def __init__(self, pipeline: Pipeline, *, max_batch: int = 8) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}; it must be at least 1")
        self.info: ModelInfo = pipeline.info
        self.ready = False
        self._pipeline = pipeline
        self._max_batch = max_batch
        self._queue: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tdm-serve device", daemon=True)

    async def start(self) -> None:
        """Starts the device thread and warms the default shape; `ready` is true afterwards."""
        self._thread.start()
        info = self.info
        await self.generate([Request("warm-up", 0, info.width, info.height)])
        self.ready = True

    async def generate(self, requests: Sequence[Request]) -> list[GeneratedImage]:
        """Checks every request, then queues them all. Raises InvalidRequest before anything is queued."""
        for request in requests:
            self._pipeline.check(request)
        jobs = [_Job(request) for request in requests]
        with self._wake:
            if self._closing:
                raise EngineClosed("the server is shutting down and takes no new requests")
            self._queue.extend(jobs)
            self._wake.notify()
        futures = [asyncio.wrap_future(job.future) for job in jobs]
        return list(await asyncio.gather(*futures))

    async def close(self) -> None:
        """Finishes what is queued, then stops the thread."""
        self.ready = False
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

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
            return batch

    def _make(self, batch: Sequence[_Job]) -> None:
        """Runs a batch; whatever goes wrong reaches its callers and never ends the thread."""
        wanted = [job for job in batch if job.future.set_running_or_notify_cancel()]
        try:
            images = self._pipeline.generate([job.request for job in wanted])
        except Exception as error:
            logger.exception("a batch of %d failed", len(wanted))
            for job in wanted:
                job.future.set_exception(error)
            return
        for job, image in zip(wanted, images, strict=True):
            job.future.set_result(image)
