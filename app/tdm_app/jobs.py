"""Jobs: accepted when they are on the disk, fed to the engine as it has room, ended exactly once.

The engine's own queue is short on purpose, since everybody in it was promised a time. Jobs may wait longer: here, in a
queue of their own, of which only so much is handed on as keeps the device busy. So direct requests find the engine's
queue open however many jobs wait, and a job is refused only when this queue is full.

The database is the truth. What is in memory can be lost at any moment: at the next start all jobs that have not ended
are queued again, with the seeds that were drawn at acceptance, so that they give the same pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from tdm_app.asking import Asked, understand
from tdm_app.delivery import keep
from tdm_app.errors import for_the_log, problem_of
from tdm_app.job_progress import follow
from tdm_app.job_queue import JobQueue
from tdm_app.job_table import Job, new_id
from tdm_app.live_job import LiveJob
from tdm_app.schemas_jobs import JobRequest
from tdm_app.service import Service
from tdm_app.sse import ended
from tdm_serve.errors import (
    Cancelled,
    DeadlinePassed,
    DeadlineUnreachable,
    EngineClosed,
    EngineFailed,
    OutputError,
    Overloaded,
    TdmServeError,
)
from tdm_serve.stats import WarmShape
from tdm_serve.ticket import Ticket

log = logging.getLogger(__name__)
T = TypeVar("T")

FED_BATCHES = 2  # pictures of jobs in the engine, in its best batches: one on the device, one behind it
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0  # between two attempts to hand a job to a busy engine
NOT_WARM_MS = 5000.0  # when to come back while nothing can be predicted
FULL_PAUSE_S = 2.0  # between two attempts to write to a full disk
TRIES = 2  # of a job whose engine died under it


class Jobs:
    """The jobs of one service. Everything happens in its event loop; `running` is its life."""

    def __init__(self, service: Service) -> None:
        self._service, self._state, self._store = service, service.state, service.store
        self._queue = JobQueue()
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._loaded = asyncio.Event()
        self._carriers: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Feeds the engine from entry to exit. At exit the engine has to be closed, so that nothing more is made."""
        feeder = asyncio.create_task(self._feed(), name="jobs")
        releaser = asyncio.create_task(self._release_listeners(), name="listeners of jobs")
        try:
            yield
        finally:
            await ended(feeder)
            await ended(releaser)
            if self._carriers:
                await asyncio.wait(self._carriers)
            for live in self._queue.all:
                live.end()

    async def _release_listeners(self) -> None:
        """When the service stops, nobody may wait any longer for a job that waits."""
        await self._service.stopping.wait()
        for live in self._queue.waiting:
            live.end()

    def counts(self) -> dict[str, int]:
        """Jobs that have not ended, by status."""
        running = sum(live.running for live in self._queue.all)
        return {"queued": len(self._queue) - running, "running": running}

    def live(self, job_id: str) -> LiveJob | None:
        """A job that has not ended."""
        return self._queue.get(job_id)

    async def add(self, body: JobRequest, asked: Asked, owner: str) -> Job:
        """Accepts a job: it is on the disk when this returns. Raises Overloaded where the queue is full."""
        await self._loaded.wait()
        self._check_room()
        body = body.model_copy(update={"seed": asked.requests[0].seed, "model": asked.model.id})
        live = LiveJob(new_id("job"), next(self._numbers), body, asked, time.time())
        eta_ms = self.eta_ms(live)
        _check_deadline(asked, eta_ms)
        self._queue.add(live)  # before the disk, so that two at once cannot both take the last place
        live.accepted = False
        try:
            stored = body.model_dump(mode="json") | {"tenant": asked.terms.tenant}
            job = await self._state.add_job(owner, stored, eta_ms, live.id)
        except BaseException:
            self._queue.drop(live.id)
            raise
        live.accepted = True
        self._wake.set()
        return job

    async def cancel(self, job_id: str) -> bool:
        """Calls a job off; False where it has ended already. Its pictures leave the device within one evaluation."""
        done = await self._state.cancel_job(job_id)
        live = self._queue.drop(job_id) if done else None
        if live is not None:
            if live.ticket is not None:
                live.ticket.cancel()
            live.end()
            self._wake.set()
        return done

    def position(self, live: LiveJob) -> int:
        """Pictures of others that come before this job's."""
        if live.ticket is not None:
            return live.ticket.position
        stats = self._service.engine.stats()
        return stats.waiting + stats.running + sum(other.pictures for other in self._queue.before(live))

    def eta_ms(self, live: LiveJob) -> float | None:
        """Milliseconds until its pictures are predicted to be there; None while the model is not warm."""
        if live.ticket is not None:
            return live.ticket.eta_ms
        shapes = self._service.engine.capabilities()
        if not shapes:
            return None
        first = sum(_cost_ms(other, shapes[0]) for other in self._queue.before(live))
        return self._service.engine.stats().backlog_ms + first + _cost_ms(live, shapes[0])

    def _check_room(self) -> None:
        limit, waiting = self._service.settings.max_jobs, self._queue.waiting
        if len(waiting) >= limit:
            first = min(waiting, key=lambda live: live.rank)
            retry_after_ms = self.eta_ms(first) or NOT_WARM_MS
            raise Overloaded(f"{len(waiting)} jobs wait already; allowed: {limit}", retry_after_ms)

    async def _feed(self) -> None:
        """Hands jobs to the engine for as long as it takes any."""
        pause_s: float | None = None
        with contextlib.suppress(EngineClosed):  # the service stops, or never started; the disk has what waits
            await self._load()
            await self._service.started()
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause_s)
                self._wake.clear()
                pause_s = self._fill()

    async def _load(self) -> None:
        """Takes up what an earlier process left. A job that this server no longer takes fails with its reason."""
        for job in await self._written("jobs of an earlier process", self._state.jobs_to_run):
            try:
                self._queue.add(self._revived(job))
            except (TdmServeError, ValidationError) as error:
                fail = partial(self._state.fail_job, job.id, problem_of(error).body()["error"])
                await self._written(f"job {job.id}", fail)
        self._loaded.set()
        self._wake.set()

    def _revived(self, job: Job) -> LiveJob:
        fields = dict(job.body)
        tenant = str(fields.pop("tenant"))
        body = JobRequest.model_validate(fields)
        asked = understand(body, self._service.infos, self._service.settings, tenant)
        return LiveJob(job.id, next(self._numbers), body, asked, job.created_s)

    def _fill(self) -> float | None:
        """Hands jobs on while the engine has room. Seconds until the next attempt, None to wait for a change."""
        if self._service.engine.hung is not None:
            return LONGEST_PAUSE_S
        best = max((shape.best_batch for shape in self._service.engine.capabilities()), default=1)
        while self._has_room(best) and (live := self._queue.next()) is not None:
            try:
                ticket = self._submit(live)
            except EngineClosed:
                raise
            except TdmServeError as error:
                if isinstance(error, Overloaded) and not isinstance(error, DeadlineUnreachable):
                    return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, error.retry_after_ms / 1000))
                self._queue.drop(live.id)
                self._spawn(self._fail(live, error))
            else:
                self._queue.serve(live)
                live.ticket = ticket
                self._spawn(self._carry(live, ticket))
        return None

    def _has_room(self, best: int) -> bool:
        return self._queue.fed < FED_BATCHES * best and not self._service.stopping.is_set()

    def _submit(self, live: LiveJob) -> Ticket:
        terms = live.asked.terms
        if terms.deadline_ms is not None:
            left_ms = (live.deadline_s - time.time()) * 1000
            if left_ms <= 0:
                raise DeadlinePassed(f"deadline_ms is {terms.deadline_ms:g}, which passed while the job waited")
            terms = replace(terms, deadline_ms=left_ms)
        return self._service.engine.submit(live.asked.requests, terms, previews=live.body.partial_images > 0)

    async def _carry(self, live: LiveJob, ticket: Ticket) -> None:
        """From the engine to the disk. Whatever happens, the job ends, or waits again."""
        try:
            await follow(live, ticket, self._begin)
            await self._finish(live, ticket)
        except EngineClosed:
            return  # the service stops; the next start runs the job again
        except Cancelled:
            with contextlib.suppress(OutputError):  # whoever called it off has written that down
                await self._state.cancel_job(live.id)
        except EngineFailed as error:
            live.tries += 1
            if live.tries < TRIES:
                live.ticket, live.running = None, False
                self._wake.set()
                return
            await self._fail(live, error)
        except Exception as error:
            if for_the_log(error):
                log.exception("job %s failed", live.id)
            ticket.cancel()
            await self._fail(live, error)
        self._over(live)

    async def _begin(self, live: LiveJob) -> None:
        try:
            live.running = await self._state.start_job(live.id)
        except OutputError as error:  # its end needs the disk, and waits for it
            log.error("job %s: %s", live.id, error)
            live.running = True

    async def _finish(self, live: LiveJob, ticket: Ticket) -> None:
        pictures = await ticket.result()
        kept = await self._written(f"job {live.id}", lambda: keep(self._service, live.body, pictures))
        result: dict[str, Any] = kept.answer.model_dump(mode="json")
        finish = partial(self._state.finish_job, live.id, result, kept.files, kept.recipes)
        if not await self._written(f"job {live.id}", finish):
            await self._store.remove(kept.files)  # it was cancelled in its last moment

    async def _fail(self, live: LiveJob, error: Exception) -> None:
        with contextlib.suppress(EngineClosed):
            await self._written(
                f"job {live.id}", partial(self._state.fail_job, live.id, problem_of(error).body()["error"])
            )
        self._over(live)

    async def _written(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        """What `write` returns, which is tried until the disk has room. EngineClosed where the service stops first."""
        while True:
            try:
                return await write()
            except OutputError as error:
                log.error("%s: tried again in %g s: %s", what, FULL_PAUSE_S, error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._service.stopping.wait(), FULL_PAUSE_S)
                raise EngineClosed("the service stops")

    def _over(self, live: LiveJob) -> None:
        self._queue.drop(live.id)
        live.end()
        self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)


def _check_deadline(asked: Asked, eta_ms: float | None) -> None:
    deadline_ms = asked.terms.deadline_ms
    if deadline_ms is not None and eta_ms is not None and eta_ms > deadline_ms:
        raise DeadlineUnreachable(f"deadline_ms is {deadline_ms:g}; the job is predicted to take {eta_ms:.0f}", eta_ms)


def _cost_ms(live: LiveJob, shape: WarmShape) -> float:
    """What its pictures take, one after the other: the time of a warm shape, scaled to their pixels and steps."""
    request, model = live.asked.requests[0], live.asked.model
    alone_ms = shape.alone_ms.get(model.id, max(shape.alone_ms.values(), default=0.0))
    pixels = request.width * request.height / (shape.width * shape.height)
    steps = len(model.sigmas)
    return live.pictures * alone_ms * pixels * (request.steps or steps) / steps
