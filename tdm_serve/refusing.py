"""The sentence for each way in which the scheduler refuses a request, as the error that its owner gets."""

from __future__ import annotations

from tdm_serve.errors import DeadlineUnreachable, Overloaded
from tdm_serve.scheduler import Refusal


def error_of(refusal: Refusal) -> Overloaded:
    wait_ms = refusal.retry_after_ms
    if refusal.reason == "deadline":
        return DeadlineUnreachable(
            "the pictures are predicted to take longer than deadline_ms allows; give them more time, or leave it out",
            wait_ms,
        )
    if refusal.reason == "queue_full":
        return Overloaded(f"the queue is full; there will be room in about {wait_ms:.0f} ms", wait_ms)
    return Overloaded(f"the queue is too long to be done in time; try again in about {wait_ms:.0f} ms", wait_ms)
