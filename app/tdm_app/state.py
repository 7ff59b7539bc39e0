"""What the service remembers: jobs, recipes of pictures, feedback and keys, in one SQLite file in one folder.

One thread writes and one reads, each with its own connection, so the event loop never waits for a disk and a reader
never for a writer. A full disk makes the call fail with OutputError and nothing else.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from tdm_app import job_table, keys, picture_table
from tdm_app.database import EMPTY_LOG, connect, sentences, transaction
from tdm_app.job_table import Job, Json, new_id
from tdm_app.lock import FolderLock
from tdm_app.picture_table import Picture

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

DATABASE = "state.sqlite"


class State:
    """Open it once per process, and close it after everything that uses it. Its methods are for one event loop."""

    def __init__(self, folder: Path) -> None:
        """ConfigError where another server has the folder or its database is not ours, OutputError without space."""
        self.folder = folder
        self.path = folder / DATABASE
        self._lock = FolderLock(folder)
        try:
            self._write_connection = connect(self.path)
            self._read_connection = connect(self.path)
        except BaseException:
            self._lock.release()
            raise
        self._writer = ThreadPoolExecutor(1, "state writer")
        self._reader = ThreadPoolExecutor(1, "state reader")
        self._temporary = self._closed = False

    @classmethod
    def temporary(cls) -> State:
        """One that is gone when it is closed: for an app in another program that keeps nothing."""
        state = cls(Path(tempfile.mkdtemp(prefix="tdm-serve-state-")))
        state._temporary = True
        return state

    def has_keys(self) -> bool:
        """Whether anybody could be let in. Before the event loop runs."""
        with sentences(self.path):
            return any(key.revoked_s is None for key in keys.listed(self._read_connection))

    def close(self) -> None:
        """Ends what is under way, and lets the folder go. Doing it twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._writer.shutdown()
        self._reader.shutdown()
        self._read_connection.close()
        self._write_connection.close()
        self._lock.release()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def write(
        self, function: Callable[Concatenate[sqlite3.Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Runs `function(connection, ...)` as one transaction, which is on the disk when this returns."""
        work = functools.partial(function, self._write_connection, *args, **kwargs)
        return await self._run(self._writer, self._in_transaction, True, work)

    async def write_soon(
        self, function: Callable[Concatenate[sqlite3.Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """As `write`, but a power cut may undo it (kill -9 does not): for what can be made again or be missed."""
        work = functools.partial(function, self._write_connection, *args, **kwargs)
        return await self._run(self._writer, self._in_transaction, False, work)

    async def read(
        self, function: Callable[Concatenate[sqlite3.Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Runs `function(connection, ...)`, which only reads."""
        work: Callable[[], R] = functools.partial(function, self._read_connection, *args, **kwargs)
        return await self._run(self._reader, lambda: self._told(work))

    async def add_job(self, owner: str, body: Json, eta_ms: float | None = None, job_id: str | None = None) -> Job:
        """Accepts a job: when this returns it survives everything but the loss of the disk."""
        return await self.write(job_table.add, owner, body, eta_ms, job_id or new_id("job"))

    async def job(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job; None where it is not there or not of `owner`. An owner of None (an admin) may see all."""
        return await self.read(job_table.get, job_id, owner)

    async def jobs(self, owner: str | None = None, limit: int = 100, after: str | None = None) -> list[Job]:
        """The newest jobs of an owner, newest first, from below `after` on. InvalidRequest where that is none."""
        return await self.read(job_table.of, owner, limit, after)

    async def start_job(self, job_id: str) -> bool:
        """queued -> running; False where it is not queued any more."""
        return await self.write_soon(job_table.start, job_id)

    async def finish_job(
        self, job_id: str, result: Json, files: Sequence[str] = (), pictures: Mapping[str, Json] | None = None
    ) -> bool:
        """-> succeeded, with result, files and recipes at once; False, and nothing written, where it has ended."""
        return await self.write(job_table.finish, job_id, result, files, pictures or {})

    async def fail_job(self, job_id: str, error: Json) -> bool:
        """-> failed with the inside of an error body; False where it has ended."""
        return await self.write(job_table.fail, job_id, error)

    async def cancel_job(self, job_id: str) -> bool:
        """-> cancelled; False where it has ended."""
        return await self.write(job_table.cancel, job_id)

    async def jobs_to_run(self) -> list[Job]:
        """Once, at start: all jobs that have not ended, in the order of acceptance, queued again."""
        return await self.write(job_table.to_run)

    async def remember(self, recipes: Mapping[str, Mapping[str, Any]], owner: str = "") -> None:
        """Keeps recipes by image id, so that the pictures can be rated. Only where feedback is switched on."""
        await self.write_soon(picture_table.remember, recipes, owner)

    async def picture(self, image_id: str, owner: str | None = None) -> Picture | None:
        """A picture's recipe; None where it is not there or not of `owner`."""
        return await self.read(picture_table.get, image_id, owner)

    async def purge(self, *, jobs_s: float, pictures_s: float, now_s: float | None = None) -> list[str]:
        """Forgets jobs that ended, and pictures that were made, longer ago. Returns the files to remove."""
        now = time.time() if now_s is None else now_s
        await self.write_soon(picture_table.purge, now - pictures_s)
        return await self.write(job_table.purge, now - jobs_s)

    async def empty_log(self) -> None:
        """Makes what was deleted go from the disk, too."""
        await self._run(self._writer, lambda: self._told(lambda: self._write_connection.execute(EMPTY_LOG).fetchall()))

    async def _run(self, executor: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *args)

    def _in_transaction(self, durable: bool, work: Callable[[], T]) -> T:
        with sentences(self.path), transaction(self._write_connection, durable):
            return work()

    def _told(self, work: Callable[[], T]) -> T:
        with sentences(self.path):
            return work()
