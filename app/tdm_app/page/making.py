"""From requests to what the page shows while they are made: previews as they come, and how long it still takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tdm_app.page.figures import Strip, address
from tdm_serve.core import Progress
from tdm_serve.ticket import Ticket

TICK_S = 0.4  # without news the status is renewed this often
FEW = 8  # evaluations a picture, up to which every single one is shown; of more, the newest whenever there is time


@dataclass(frozen=True, slots=True)
class View:
    """One moment of an ask: per picture its newest progress and the previews so far."""

    newest: tuple[Progress | None, ...]
    strips: tuple[Strip, ...]
    ahead: int  # pictures of others that come first
    left_ms: float

    @property
    def done(self) -> int:
        """Evaluations so far, of all pictures."""
        return sum(one.step for one in self.newest if one)

    @property
    def total(self) -> int:
        """Evaluations of all pictures, as far as is known; 0 before the first news."""
        totals = [one.total for one in self.newest if one]
        return sum(totals) + max(totals, default=0) * (len(self.newest) - len(totals))

    @property
    def share(self) -> float:
        """Of all evaluations, 0 to 1."""
        return sum(one.step / one.total for one in self.newest if one) / len(self.newest)


async def watch(ticket: Ticket, pictures: int) -> AsyncGenerator[View]:
    """A View at once, one per evaluation (of few), and one every TICK_S. Ends, or raises, when the ticket does."""
    newest: list[Progress | None] = [None] * pictures
    strips: list[Strip] = [()] * pictures
    async with aclosing(_batches(ticket.progress())) as batches:
        yield View(tuple(newest), tuple(strips), ticket.position, ticket.eta_ms)
        async for batch in batches:
            for progress in batch:
                newest[progress.index] = progress
                if progress.preview is not None:
                    strips[progress.index] += (address(progress.preview),)
            yield View(tuple(newest), tuple(strips), ticket.position, ticket.eta_ms)


async def _batches(events: AsyncIterator[Progress]) -> AsyncGenerator[Sequence[Progress]]:
    """What is there already, together; an empty batch after TICK_S of silence.

    The pictures of one evaluation come together, and a page that lags behind a long run skips what it has missed.
    Nothing of few evaluations is skipped: a batch then ends before the second news of a picture.
    """
    pending = asyncio.ensure_future(_next(events))
    batch: list[Progress] = []
    try:
        while True:
            await asyncio.wait({pending}, timeout=0 if batch else TICK_S)
            if pending.done():
                event = pending.result()
                if batch and (event is None or _is_next_frame(event, batch)):
                    yield batch
                    batch = []
                if event is None:
                    return
                batch.append(event)
                pending = asyncio.ensure_future(_next(events))
            else:
                yield batch
                batch = []
    finally:
        pending.cancel()
        await asyncio.wait({pending})


def _is_next_frame(event: Progress, batch: Sequence[Progress]) -> bool:
    return event.total <= FEW and any(event.index == other.index for other in batch)


async def _next(events: AsyncIterator[Progress]) -> Progress | None:
    return await anext(events, None)
