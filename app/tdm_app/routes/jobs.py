"""`/v1/jobs`: pictures that are asked for now and fetched later."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from tdm_app.access import note
from tdm_app.asking import facts_of, tenant_of, understand
from tdm_app.auth import caller_of
from tdm_app.delivery import fetch
from tdm_app.errors import AlreadyFinished, NotFound
from tdm_app.job_table import Job as JobRow
from tdm_app.jobs import Jobs
from tdm_app.ratelimit import Limiter
from tdm_app.schemas import ErrorBody, ErrorResponse, ImagesResponse
from tdm_app.schemas_jobs import Job, JobList, JobRequest
from tdm_app.service import Service
from tdm_app.sse import EventStream, event, kept_alive

MAX_LISTED = 100
MAX_ID = 100
HEARD = "`job.status`, then `job.progress`; last `job.succeeded`, `job.failed` or `job.cancelled`, with the job."
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"description": HEARD}}},
    }
}


def jobs_router(service: Service, jobs: Jobs, limiter: Limiter) -> APIRouter:
    """Ask, look, listen, call off. A job is seen by who asked for it, and by admins."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses={"default": {"model": ErrorResponse}})
    view = JobView(service, jobs)

    @router.post("", status_code=202)
    async def create_job(body: JobRequest, request: HttpRequest) -> Job:  # pyright: ignore[reportUnusedFunction]
        """Accepts a job. It is on the disk when the answer comes, and will end whatever happens to the process."""
        service.must_not_hang()
        caller = caller_of(request)
        asked = understand(body, service.infos, service.settings, tenant_of(caller, body.user))
        for one in asked.requests:
            service.engine.check(one)
        limiter.pictures(caller, body.n)
        job = await jobs.add(body, asked, caller.id)
        note(request, job=job.id, **facts_of(body, asked, service.settings))
        return await view.of(job, request, pictures=False)

    @router.get("")
    async def list_jobs(  # pyright: ignore[reportUnusedFunction]
        request: HttpRequest,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        after: Annotated[str | None, Query(min_length=1, max_length=MAX_ID)] = None,
    ) -> JobList:
        """The caller's newest jobs, newest first, without pictures; `after` the last one of the page before."""
        found = await service.state.jobs(caller_of(request).owner, limit + 1, after)
        page = [await view.of(job, request, pictures=False) for job in found[:limit]]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return JobList(data=page, first_id=first, last_id=last, has_more=len(found) > limit)

    @router.get("/{job_id}")
    async def get_job(job_id: str, request: HttpRequest) -> Job:  # pyright: ignore[reportUnusedFunction]
        """How far a job is; its pictures when it has succeeded."""
        return await view.of(await view.find(job_id, request), request)

    @router.delete("/{job_id}")
    async def cancel_job(job_id: str, request: HttpRequest) -> Job:  # pyright: ignore[reportUnusedFunction]
        """Calls a job off, within one evaluation where it is running. 409 when it has ended."""
        job = await view.find(job_id, request)
        if not await jobs.cancel(job.id):
            ended = await view.find(job_id, request)
            raise AlreadyFinished(
                f"job {job.id} has {ended.status} already; only queued and running ones are cancelled"
            )
        return await view.of(await view.find(job_id, request), request)

    @router.get("/{job_id}/events", response_class=Response, responses=EVENTS)
    async def job_events(  # pyright: ignore[reportUnusedFunction]
        job_id: str, request: HttpRequest, last_event_id: Annotated[str, Header()] = ""
    ) -> Response:
        """The job's progress from its first evaluation on, for whoever comes, and its end.

        A listener that was cut off goes on where it was by sending `last-event-id`.
        """
        job = await view.find(job_id, request)
        after = int(last_event_id) if last_event_id.isdecimal() and len(last_event_id) < 10 else 0
        return EventStream(kept_alive(view.events(job, request, after), service.settings.keepalive_s))

    return router


class JobView:
    """Jobs as the API shows them."""

    def __init__(self, service: Service, jobs: Jobs) -> None:
        self._service = service
        self._jobs = jobs

    async def find(self, job_id: str, request: HttpRequest) -> JobRow:
        """Raises NotFound, also for somebody else's."""
        job = await self._service.state.job(job_id, caller_of(request).owner)
        if job is None:
            raise NotFound(f"there is no job {job_id[:100]!r}; finished ones are forgotten after a while")
        return job

    async def of(self, job: JobRow, request: HttpRequest, *, pictures: bool = True) -> Job:
        """One job; `pictures` of a succeeded one are read from the store."""
        live = self._jobs.live(job.id)
        retention_s = self._service.settings.job_retention_s
        eta_ms = None if live is None or job.ended else self._jobs.eta_ms(live)
        return Job(
            id=job.id,
            status=job.status,
            created_at=job.created_s,
            started_at=job.started_s,
            finished_at=job.finished_s,
            expires_at=None if job.finished_s is None else job.finished_s + retention_s,
            model=job.body["model"],
            n=job.body["n"],
            seed=job.body["seed"],
            position=0 if live is None or job.ended else self._jobs.position(live),
            eta_ms=None if eta_ms is None else round(eta_ms, 1),
            result=await self._result(job, request) if pictures and job.result else None,
            error=ErrorBody(**job.error) if job.error else None,
        )

    async def _result(self, job: JobRow, request: HttpRequest) -> ImagesResponse:
        answer = ImagesResponse.model_validate(job.result)
        as_links = job.body["response_format"] == "url"
        base_url = self._service.base_url(request)
        return await fetch(self._service, answer, job.files, as_links=as_links, base_url=base_url)

    async def events(self, job: JobRow, request: HttpRequest, after: int) -> AsyncGenerator[bytes]:
        """How it stands, what happens, and how it ended."""
        live = self._jobs.live(job.id)
        if live is not None:
            yield event("job.status", (await self.of(job, request)).model_dump_json())
            async for chunk in live.listen(after):
                yield chunk
        job = await self.find(job.id, request)
        name = f"job.{job.status}" if job.ended else "job.status"  # not ended: the service stops
        yield event(name, (await self.of(job, request)).model_dump_json())
