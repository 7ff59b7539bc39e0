"""One engine, its state and the state of its start: what the routes and the page share.

The engine warms up in the background, so that liveness probes are answered while it does; whoever asks for
a picture before it is warm waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from starlette.requests import HTTPConnection

from tdm_app.feedback import Feedback
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_app.store import MIB, Store
from tdm_serve import AsyncEngine, GeneratedImage, ModelInfo
from tdm_serve.core import Request, Terms
from tdm_serve.errors import EngineClosed
from tdm_serve.ticket import Ticket

log = logging.getLogger(__name__)

DID_NOT_START = "the model did not start; the server's log says why"
PLAIN = Terms()


class Outside:
    """What an answer takes beside the engine, such as compression: a moving average that predictions add."""

    WEIGHT = 0.05  # of the newest answer

    def __init__(self) -> None:
        self.ms = 0.0

    def add(self, ms: float) -> None:
        """One answer's milliseconds outside the engine."""
        self.ms += (self.WEIGHT if self.ms else 1.0) * (ms - self.ms)


class Service:
    """`on_failure` is called when the engine could not start; `failure` then holds the reason."""

    def __init__(self, engine: AsyncEngine, settings: Settings, state: State) -> None:
        self.engine = engine
        self.settings = settings
        self.state = state
        self.store = Store(state.folder, settings.store_mb * MIB)
        self.feedback = Feedback(state, settings)
        self.outside = Outside()
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = _nothing
        self.stopping = asyncio.Event()  # set when the server begins to stop; endless streams end on it
        self._start: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo:
        """The default model."""
        return self.engine.info

    @property
    def infos(self) -> Mapping[str, ModelInfo]:
        """All served models by id, the default first."""
        return self.engine.infos

    @property
    def ready(self) -> bool:
        return self.engine.ready

    def base_url(self, connection: HTTPConnection) -> str:
        """Where links begin: the address that was set, or the one at which the client reached us."""
        return (self.settings.public_url or str(connection.base_url)).rstrip("/")

    def must_be_ready(self) -> None:
        """Raises EngineClosed unless a request would be served at once."""
        if self.failure is not None:
            raise EngineClosed(DID_NOT_START)
        if not self.engine.ready:
            raise EngineClosed("the model is warming up, or the service is stopping")

    async def submit(self, requests: Sequence[Request], terms: Terms = PLAIN, *, previews: bool = False) -> Ticket:
        """Hands pictures to the engine, after its start. Raises what the engine raises at once: Overloaded, ..."""
        if not self.engine.ready:
            await self.started()
        return self.engine.submit(requests, terms, previews=previews)

    async def generate(self, requests: Sequence[Request], terms: Terms = PLAIN) -> list[GeneratedImage]:
        """Pictures in the order of the requests, in batches shared with other callers. Raises InvalidRequest, ..."""
        ticket = await self.submit(requests, terms)
        try:
            return await ticket.result()
        finally:
            ticket.cancel()

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

    async def started(self) -> None:
        """Waits for the start. Shielded: a caller that gives up must not cancel everybody's engine."""
        if self._start is None:
            raise EngineClosed("the service is not running; enter the lifespan of the app first")
        if not self._start.done():
            await asyncio.wait([self._start])
        if self.failure is not None or self._start.cancelled():
            raise EngineClosed(DID_NOT_START)


def _nothing() -> None:
    """Default of `on_failure`."""
