"""First come, first served over one queue: what the engine of whole batches asks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol


class Waiting(Protocol):
    """What the scheduler needs to know of a queued request."""

    @property
    def key(self) -> Hashable: ...


def next_batch(queue: Sequence[Waiting], max_batch: int) -> list[int]:
    """Indices of the requests to run now: the oldest, and the oldest others that can share its forward.

    First come, first served: nothing is ever started before an older request with the same key, and the oldest
    request is always in the batch, so none starves.
    """
    if not queue:
        return []
    key = queue[0].key
    return [index for index, waiting in enumerate(queue) if waiting.key == key][:max_batch]
