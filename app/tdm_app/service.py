"""One engine and the state of its start: what the routes and the page share.

The engine warms up in the background, so that liveness probes are answered while it does; whoever asks for
a picture before it is warm waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from tdm_serve import AsyncEngine, GeneratedImage, ModelInfo
from tdm_serve.core import Request
from tdm_serve.errors import EngineClosed, UnknownModel

log = logging.getLogger(__name__)

DID_NOT_START = "the model did not start; the server's log says why"


class Service:
    """`on_failure` is called when the engine could not start; `failure` then holds the reason."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = _nothing
        self.stopping = asyncio.Event()  # set when the server begins to stop; endless streams end on it
        self._start: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    @property
    def ready(self) -> bool:
        return self.engine.ready

    def must_be(self, model: str | None) -> None:
        """Raises UnknownModel unless `model` is the loaded one; None means whatever is loaded."""
        if model is not None and model != self.info.id:
            raise UnknownModel(f"model {model!r} is not loaded; allowed: {self.info.id!r}")

    def must_be_ready(self) -> None:
        """Raises EngineClosed unless a request would be served at once."""
        if self.failure is not None:
            raise EngineClosed(DID_NOT_START)
        if not self.engine.ready:
            raise EngineClosed("the model is warming up, or the service is stopping")

    async def generate(self, requests: Sequence[Request]) -> list[GeneratedImage]:
        """Pictures in the order of the requests, in batches shared with other callers. Raises InvalidRequest."""
        if not self.engine.ready:
            await self._started()
        return await self.engine.generate(requests)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Starts the engine in the background on entry; closes it on exit, also in the middle of the start."""
        self._start = asyncio.create_task(self._begin(), name="engine start")
        try:
            yield
        finally:
            self._start.cancel()
            await asyncio.wait([self._start])
            await self.engine.close()

    async def _begin(self) -> None:
        try:
            await self.engine.start()
        except Exception as error:  # whatever it is, the service cannot serve, and has to say so
            self.failure = error
            log.error("the engine did not start: %s", error, exc_info=error)
            self.on_failure()

    async def _started(self) -> None:
        """Waits for the start. Shielded: a caller that gives up must not cancel everybody's engine."""
        if self._start is None:
            raise EngineClosed("the service is not running; enter the lifespan of the app first")
        if not self._start.done():
            await asyncio.wait([self._start])
        if self.failure is not None or self._start.cancelled():
            raise EngineClosed(DID_NOT_START)


def _nothing() -> None:
    """Default of `on_failure`."""
