"""A job that has not ended: what it asks for, how far it is, and everybody who listens to it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from tdm_app.asking import Asked
from tdm_app.schemas_jobs import JobRequest
from tdm_app.sse import event
from tdm_serve.ticket import Ticket


@dataclass(slots=True, eq=False)
class LiveJob:
    """`log` holds the progress events from the first on, so that a listener may come late or come back."""

    id: str
    number: int  # order of acceptance
    body: JobRequest
    asked: Asked
    created_s: float  # Unix
    accepted: bool = True  # on the disk
    ticket: Ticket | None = None  # while the engine has it
    running: bool = False  # its first evaluation is done
    ended: bool = False
    tries: int = 0
    log: list[bytes] = field(default_factory=list[bytes])
    _waiters: set[asyncio.Future[None]] = field(default_factory=set[asyncio.Future[None]])

    @property
    def pictures(self) -> int:
        return len(self.asked.requests)

    @property
    def tenant(self) -> str:
        return self.asked.terms.tenant

    @property
    def deadline_s(self) -> float:
        """Unix seconds; infinite where there is none."""
        deadline_ms = self.asked.terms.deadline_ms
        return math.inf if deadline_ms is None else self.created_s + deadline_ms / 1000

    @property
    def rank(self) -> tuple[int, float, int]:
        """Lower goes first: by priority, then by deadline, then by age."""
        return -self.asked.terms.priority, self.deadline_s, self.number

    def tell(self, name: str, data: str) -> None:
        """Adds an event to the log."""
        self.log.append(event(name, data, len(self.log) + 1))
        self.wake()

    def end(self) -> None:
        """Nothing more will come, here; the database has the rest."""
        self.ended = True
        self.wake()

    def wake(self) -> None:
        """Lets listeners look."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def listen(self, after: int = 0) -> AsyncGenerator[bytes]:
        """The events from number `after` + 1 on, until the job has ended."""
        seen = min(after, len(self.log))
        while True:
            while seen < len(self.log):
                seen += 1
                yield self.log[seen - 1]
            if self.ended:
                return
            await self._change()

    async def _change(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
