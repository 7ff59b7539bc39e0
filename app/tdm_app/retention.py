"""Forgetting on time: finished jobs, pictures, recipes and ratings go when the settings say so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

from tdm_app import feedback_table
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_app.store import Store
from tdm_serve.errors import OutputError

log = logging.getLogger(__name__)

EVERY_S = 60.0


async def forget(state: State, store: Store, settings: Settings, now_s: float | None = None) -> None:
    """Removes what is over its time now. Rows go first: a row never points to a file that was removed for it."""
    now = time.time() if now_s is None else now_s
    files = await state.purge(jobs_s=settings.job_retention_s, pictures_s=settings.picture_retention_s, now_s=now)
    await state.write_soon(feedback_table.purge, now - settings.feedback_retention_s)
    await store.remove(files)
    await store.purge(now)


@contextlib.asynccontextmanager
async def forgetting(state: State, store: Store, settings: Settings, every_s: float = EVERY_S) -> AsyncGenerator[None]:
    """Forgets at the start of the block and then now and again; a full disk is logged and tried again."""

    async def run() -> None:
        while True:
            try:
                await forget(state, store, settings)
            except OutputError as error:
                log.error("%s", error)
            await asyncio.sleep(every_s)

    task = asyncio.create_task(run(), name="retention")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
