"""What a caller holds while its pictures are made, and the mailbox through which the device thread reaches it.

Everything that a caller sees changes in its own event loop only, in the order in which it was posted. A loop that is
closed takes no posts; the engine then calls off what nobody waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from tdm_serve.core import GeneratedImage, Progress

Outcome = list[GeneratedImage] | Exception


class Mailbox:
    """What has arrived for one ticket: progress, then the outcome. For the thread of its event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.number = 0  # of the ticket, once it has one
        self.promised_ms = 0.0  # from acceptance to the last picture
        self.took_ms: float | None = None  # the same as it was
        self.progress: list[Progress] = []
        self.outcome: Outcome | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[], object]] = []

    def put(self, progress: Progress) -> None:
        """One evaluation is done. Ignored after the outcome."""
        if self.outcome is None:
            self.progress.append(progress)
            self._wake()

    def settle(self, outcome: Outcome) -> None:
        """The last thing that arrives; what comes later is ignored."""
        if self.outcome is None:
            self.outcome = outcome
            self._wake()
            for callback in self._callbacks:
                self.loop.call_soon(callback)
            self._callbacks.clear()

    def on_outcome(self, callback: Callable[[], object]) -> None:
        """Calls back in the event loop once the outcome is here, at the next turn of the loop where it already is."""
        if self.outcome is None:
            self._callbacks.append(callback)
        else:
            self.loop.call_soon(callback)

    async def arrival(self) -> Outcome:
        """Waits for the outcome."""
        while self.outcome is None:
            await self.change()
        return self.outcome

    async def change(self) -> None:
        """Returns when the next thing has arrived."""
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


Letter = tuple[Mailbox, Progress | Outcome]


def post(letters: Sequence[Letter]) -> list[Mailbox]:
    """Delivers from any thread, in order, with one wake-up per event loop. Returns the mailboxes of closed loops."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
    for letter in letters:
        by_loop.setdefault(letter[0].loop, []).append(letter)
    lost: list[Mailbox] = []
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, mine)
        except RuntimeError:  # the loop is closed; there is no other way to ask without a race
            lost.extend(mailbox for mailbox, _ in mine)
    return lost


def _deliver(letters: Sequence[Letter]) -> None:
    for mailbox, content in letters:
        if isinstance(content, Progress):
            mailbox.put(content)
        else:
            mailbox.settle(content)


class Owner(Protocol):
    """What a ticket asks of the engine; all three from any thread."""

    def cancel(self, number: int) -> bool: ...
    def eta_ms(self, number: int) -> float: ...
    def position(self, number: int) -> int: ...


class Ticket:
    """Pictures that an engine has accepted. Use it in the event loop in which it was submitted; `cancel` anywhere."""

    def __init__(self, id: str, number: int, mailbox: Mailbox, owner: Owner) -> None:  # noqa: A002 - its public name
        self.id = id
        self._number = number
        self._mailbox = mailbox
        self._owner = owner

    @property
    def done(self) -> bool:
        """The outcome is here: `result` returns or raises at once."""
        return self._mailbox.outcome is not None

    @property
    def eta_ms(self) -> float:
        """Milliseconds from now until all pictures are predicted to be there; 0 when done."""
        return 0.0 if self.done else self._owner.eta_ms(self._number)

    @property
    def promised_ms(self) -> float:
        """Milliseconds from acceptance in which all pictures were promised."""
        return self._mailbox.promised_ms

    @property
    def took_ms(self) -> float | None:
        """Milliseconds from acceptance to the outcome; None until then."""
        return self._mailbox.took_ms

    @property
    def position(self) -> int:
        """Pictures of others that come before these; 0 when these are being made, or done."""
        return 0 if self.done else self._owner.position(self._number)

    async def result(self) -> list[GeneratedImage]:
        """The pictures in the order of the requests. Raises what became of the ticket instead: Cancelled, ...

        May be awaited several times. Cancelling the waiting task does not cancel the ticket.
        """
        return _value(await self._mailbox.arrival())

    async def progress(self) -> AsyncIterator[Progress]:
        """Every evaluation of every picture, from the first; ends when all are done. Raises as `result` does.

        The last evaluation of a picture never has a preview: the picture itself follows.
        """
        mailbox, seen = self._mailbox, 0
        while True:
            while seen < len(mailbox.progress):
                seen += 1
                yield mailbox.progress[seen - 1]
            if mailbox.outcome is not None:
                break
            await mailbox.change()
        _value(mailbox.outcome)

    def cancel(self) -> bool:
        """Calls the pictures off within one evaluation; waiting for them raises Cancelled. False if too late."""
        return self._owner.cancel(self._number)

    def add_done_callback(self, callback: Callable[[Ticket], object]) -> None:
        """Calls `callback(ticket)` in the event loop once the outcome is here."""
        self._mailbox.on_outcome(lambda: callback(self))


def _value(outcome: Outcome) -> list[GeneratedImage]:
    """Raises without the frames of whoever it was raised for before."""
    if isinstance(outcome, Exception):
        raise outcome.with_traceback(None)
    return outcome
