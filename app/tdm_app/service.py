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
from dataclasses import replace

from starlette.requests import HTTPConnection

from tdm_app.feedback import Feedback
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_app.store import MIB, Store
from tdm_serve import AsyncEngine, GeneratedImage, ModelInfo
from tdm_serve.core import Request, Terms
from tdm_serve.errors import DeadlinePassed, EngineClosed, EngineFailed
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
    """`on_start` is called once the engine has started, `on_failure` when it could not; `failure` holds the reason."""

    def __init__(self, engine: AsyncEngine, settings: Settings, state: State) -> None:
        self.engine = engine
        self.settings = settings
        self.state = state
        self.store = Store(state.folder, settings.store_mb * MIB)
        self.feedback = Feedback(state, settings)
        self.outside = Outside()
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.on_start: Callable[[], object] = _nothing
        self.on_failure: Callable[[], object] = _nothing
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

    @property
    def warming(self) -> bool:
        """Whether the engine is still on its way: who asks for pictures waits, and nothing can be promised."""
        return self._start is not None and not self._start.done()

    @property
    def trouble(self) -> str | None:
        """What an operator should know: the device hangs, or had to be started again."""
        return self.engine.hung or self.engine.degraded

    def base_url(self, connection: HTTPConnection) -> str:
        """Where links begin: the address that was set, or the one at which the client reached us."""
        return (self.settings.public_url or str(connection.base_url)).rstrip("/")

    def must_be_ready(self) -> None:
        """Raises EngineClosed unless a request would be served at once."""
        if self.failure is not None:
            raise EngineClosed(DID_NOT_START)
        self.must_not_hang()
        if not self.engine.ready:
            raise EngineClosed("the model is warming up, or the service is stopping")

    def must_not_hang(self) -> None:
        """Raises EngineFailed while the device hangs, for what would be taken without asking it."""
        if self.engine.hung is not None:
            raise EngineFailed(self.engine.hung)

    async def submit(self, requests: Sequence[Request], terms: Terms = PLAIN, *, previews: bool = False) -> Ticket:
        """Hands pictures to the engine, after its start; what that takes comes off the deadline.

        Raises what the engine raises at once (Overloaded, ...), and DeadlinePassed before a start that takes too long.
        """
        if self.warming or not self.engine.ready:
            terms = await self._after_start(terms)
        return self.engine.submit(requests, terms, previews=previews)

    async def _after_start(self, terms: Terms) -> Terms:
        if terms.deadline_ms is None:
            await self.started()
            return terms
        began = time.monotonic()
        try:
            await asyncio.wait_for(self.started(), terms.deadline_ms / 1000)
        except TimeoutError:
            late = f"deadline_ms is {terms.deadline_ms:g}, which passed while the model warmed up"
            raise DeadlinePassed(late) from None
        return replace(terms, deadline_ms=max(1e-3, terms.deadline_ms - 1000 * (time.monotonic() - began)))

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
        else:
            self.on_start()

    async def started(self) -> None:
        """Waits for the start. Shielded: a caller that gives up must not cancel everybody's engine."""
        if self._start is None:
            raise EngineClosed("the service is not running; enter the lifespan of the app first")
        if not self._start.done():
            await asyncio.wait([self._start])
        if self.failure is not None or self._start.cancelled():
            raise EngineClosed(DID_NOT_START)


def _nothing() -> None:
    """Default of `on_start` and `on_failure`."""
