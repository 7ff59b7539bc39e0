"""What a job's listeners hear while the engine works on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tdm_app.encode import encode_preview, text_of
from tdm_app.live_job import LiveJob
from tdm_app.schemas_jobs import JobProgress
from tdm_app.streaming import partial_steps
from tdm_serve.core import Progress
from tdm_serve.ticket import Ticket


async def follow(live: LiveJob, ticket: Ticket, begin: Callable[[LiveJob], Awaitable[None]]) -> None:
    """Tells every evaluation to the job's log; `begin` runs at the first. Raises what becomes of the ticket."""
    async for progress in ticket.progress():
        if not live.running:
            await begin(live)
        told = JobProgress(
            id=live.id,
            image_index=progress.index,
            step=progress.step,
            total=progress.total,
            b64_json=await _preview(live, progress),
        )
        live.tell("job.progress", told.model_dump_json())


async def _preview(live: LiveJob, progress: Progress) -> str | None:
    body = live.body
    if progress.preview is None or progress.step not in partial_steps(progress.total, body.partial_images):
        return None
    file = await asyncio.to_thread(
        encode_preview, progress.preview, live.asked.size, body.output_format, body.output_compression
    )
    return text_of(file)
