"""Jobs from acceptance to the end: what is shown, heard and kept, and to whom."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from sse_reader import Event, parse, read

from tdm_app.api import create_app
from tdm_app.asking import understand
from tdm_app.job_queue import JobQueue
from tdm_app.jobs import FED_BATCHES
from tdm_app.live_job import LiveJob
from tdm_app.schemas_jobs import JobRequest
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_serve import AsyncEngine, Pipeline
from tdm_serve.errors import EngineFailed, OutputError

pytestmark = pytest.mark.anyio

URL = "/v1/jobs"
IMAGES = "/v1/images/generations"
PROMPT = "two red circles"
FAR_S = 60.0
Check = Callable[..., dict[str, Any]]


@asynccontextmanager
async def opened(
    pipeline: Pipeline, state: State | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """A started service of its own, and its app."""
    app = create_app(AsyncEngine(pipeline), Settings.model_validate(settings), state, page=False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test")), app


async def accepted(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"prompt": PROMPT, **body})
    assert response.status_code == 202, response.text
    return response.json()


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(FAR_S):
        while (job := (await client.get(f"{URL}/{job_id}")).json())["status"] in {"queued", "running"}:
            await asyncio.sleep(0.02)
    return job


def pixels(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


async def test_the_life_of_a_job(client: httpx.AsyncClient) -> None:
    while (await client.get("/readyz")).status_code != 200:  # nothing is predicted before
        await asyncio.sleep(0.02)
    job = await accepted(client, seed=7, n=2)
    assert (job["object"], job["status"], job["n"], job["seed"], job["model"]) == ("job", "queued", 2, 7, "default")
    assert job["position"] >= 0
    assert job["eta_ms"] > 0
    done = await ended(client, job["id"])
    assert done["status"] == "succeeded"
    assert done["created_at"] <= done["started_at"] <= done["finished_at"] < done["expires_at"]
    assert (done["position"], done["eta_ms"], done["error"]) == (0, None, None)
    direct = (await client.post(IMAGES, json={"prompt": PROMPT, "seed": 7, "n": 2})).json()
    assert set(done["result"]) == set(direct)
    for mine, other in zip(done["result"]["data"], direct["data"], strict=True):
        assert mine["seed"] == other["seed"]
        assert np.array_equal(pixels(mine["b64_json"]), pixels(other["b64_json"]))


async def test_a_job_without_a_seed_says_which_was_drawn(client: httpx.AsyncClient) -> None:
    job = await accepted(client)
    done = await ended(client, job["id"])
    assert done["result"]["data"][0]["seed"] == job["seed"] == done["seed"]


async def test_results_as_links(client: httpx.AsyncClient) -> None:
    job = await accepted(client, response_format="url", output_format="webp")
    (data,) = (await ended(client, job["id"]))["result"]["data"]
    assert data["b64_json"] is None
    response = await client.get(data["url"])
    assert (response.status_code, response.headers["content-type"]) == (200, "image/webp")


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"stream": True}, 400, "unsupported_value", "stream"),
        ({"size": "1x1"}, 400, "invalid_value", "size"),
        ({"prompt": " "}, 400, "invalid_value", "prompt"),
        ({"prompt": "red " * 500}, 400, "prompt_too_long", "prompt"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"n": 11}, 400, "invalid_value", "n"),
        ({"deadline_ms": 0.01}, 429, "deadline_unreachable", "deadline_ms"),
        ({"tenant": "x"}, 400, "unknown_parameter", "tenant"),
    ],
)
async def test_refused_at_once(
    client: httpx.AsyncClient, assert_error: Check, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    before = len((await client.get(URL, params={"limit": 100})).json()["data"])
    assert_error(await client.post(URL, json={"prompt": PROMPT, **change}), status, code, param)
    assert len((await client.get(URL, params={"limit": 100})).json()["data"]) == before


async def test_a_job_that_is_not_there(client: httpx.AsyncClient, assert_error: Check) -> None:
    for method, path in (("GET", f"{URL}/nope"), ("DELETE", f"{URL}/nope"), ("GET", f"{URL}/nope/events")):
        assert_error(await client.request(method, path), 404, "not_found")


async def test_cancel(client: httpx.AsyncClient, assert_error: Check) -> None:
    jobs = [await accepted(client, n=4, seed=number) for number in range(6)]
    last = (await client.delete(f"{URL}/{jobs[-1]['id']}")).json()
    assert (last["status"], last["position"], last["eta_ms"]) == ("cancelled", 0, None)
    first = (await client.delete(f"{URL}/{jobs[0]['id']}")).json()
    assert first["status"] == "cancelled"
    error = assert_error(await client.delete(f"{URL}/{jobs[0]['id']}"), 409, "already_finished")
    assert "cancelled" in error["message"]
    ends = [(await ended(client, job["id"]))["status"] for job in jobs]
    assert ends == ["cancelled", *["succeeded"] * 4, "cancelled"]
    assert_error(await client.delete(f"{URL}/{jobs[1]['id']}"), 409, "already_finished")


async def test_events(client: httpx.AsyncClient) -> None:
    job = await accepted(client, n=2, partial_images=3)
    events, _ = parse((await client.get(f"{URL}/{job['id']}/events")).text)
    assert [events[0].name, events[-1].name] == ["job.status", "job.succeeded"]
    progress = events[1:-1]
    assert {event.name for event in progress} == {"job.progress"}
    assert [event.id for event in progress] == [str(number) for number in range(1, 9)]
    for index in (0, 1):
        mine = [event.data for event in progress if event.data["image_index"] == index]
        assert [(data["step"], data["total"]) for data in mine] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert [data["b64_json"] is not None for data in mine] == [True, True, True, False]
    assert len(events[-1].data["result"]["data"]) == 2


async def test_events_for_who_comes_late_or_back(client: httpx.AsyncClient) -> None:
    job = await accepted(client)
    await ended(client, job["id"])
    (late,), _ = parse((await client.get(f"{URL}/{job['id']}/events")).text)
    assert late.name == "job.succeeded"
    job = await accepted(client, n=2)
    response = await client.get(f"{URL}/{job['id']}/events", headers={"last-event-id": "5"})
    events, _ = parse(response.text)
    assert events[1].id in {"6", "1"}  # 1 where the job had not come to the sixth event yet
    assert events[-1].name == "job.succeeded"


async def test_events_of_a_cancelled_job(client: httpx.AsyncClient) -> None:
    jobs = [await accepted(client, n=8) for _ in range(2)]
    listening = asyncio.create_task(client.get(f"{URL}/{jobs[1]['id']}/events"))
    await asyncio.sleep(0.05)
    await client.delete(f"{URL}/{jobs[1]['id']}")
    async with asyncio.timeout(5):
        events, _ = parse((await listening).text)
    assert events[-1].name == "job.cancelled"
    await ended(client, jobs[0]["id"])


async def test_listing(client: httpx.AsyncClient, assert_error: Check) -> None:
    mine = [(await accepted(client))["id"] for _ in range(3)]
    page = (await client.get(URL, params={"limit": 2})).json()
    assert [job["id"] for job in page["data"]] == mine[:0:-1]
    assert page["has_more"]
    assert all(job["result"] is None for job in page["data"])
    assert (page["first_id"], page["last_id"]) == (mine[2], mine[1])
    newer = (await accepted(client))["id"]  # moves nothing on the pages below
    following = (await client.get(URL, params={"limit": 1, "after": page["last_id"]})).json()
    assert [job["id"] for job in following["data"]] == mine[:1]
    assert_error(await client.get(URL, params={"limit": 0}), 400, "invalid_value", "limit")
    unknown = assert_error(await client.get(URL, params={"after": "job_none"}), 400, "invalid_value", "after")
    assert "'job_none'" in unknown["message"]
    for job in (*mine, newer):
        await ended(client, job)


async def test_all_pages_together_are_all_jobs(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await ended(client, (await accepted(client))["id"])
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = (await client.get(URL, params={"limit": 2} | after)).json()
        seen += [job["id"] for job in page["data"]]
    assert seen == [job["id"] for job in (await client.get(URL, params={"limit": 100})).json()["data"]]
    last = (await client.get(URL, params={"after": seen[-1]})).json()
    assert last == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_a_full_queue_refuses(pipeline: Pipeline, assert_error: Check) -> None:
    async with opened(pipeline, max_jobs=2) as (client, app):
        await app.state.service.started()
        best = max(shape.best_batch for shape in app.state.service.engine.capabilities())
        answers = [await client.post(URL, json={"prompt": PROMPT, "n": 10}) for _ in range(best + 6)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:3] == [202] * 3  # one with the engine, two in the queue
        refused = answers[-1]
        assert "2 jobs wait" in assert_error(refused, 429, "overloaded")["message"]
        assert int(refused.headers["retry-after-ms"]) > 0
        for answer in answers:
            if answer.status_code == 202:
                await client.delete(f"{URL}/{answer.json()['id']}")


async def test_jobs_leave_the_engines_queue_open(pipeline: Pipeline) -> None:
    async with opened(pipeline) as (client, app):
        await app.state.service.started()
        best = max(shape.best_batch for shape in app.state.service.engine.capabilities())
        jobs = [await accepted(client, n=4) for _ in range(20 + best)]
        stats = app.state.service.engine.stats()
        assert stats.waiting + stats.running <= FED_BATCHES * best + 4
        direct = await client.post(IMAGES, json={"prompt": PROMPT, "priority": 5})
        assert direct.status_code == 200
        waiting = [(await client.get(f"{URL}/{job['id']}")).json() for job in jobs]
        assert sum(job["status"] == "queued" for job in waiting) >= 10  # it did not wait for all of them
        positions = [job["position"] for job in waiting if job["status"] == "queued" and job["position"]]
        assert positions == sorted(positions)
        for job in jobs:
            await client.delete(f"{URL}/{job['id']}")


async def test_priority_among_jobs(pipeline: Pipeline) -> None:
    async with opened(pipeline) as (client, app):
        await app.state.service.started()
        best = max(shape.best_batch for shape in app.state.service.engine.capabilities())
        plain = [await accepted(client, n=2) for _ in range(best + 6)]  # more than the engine is handed at once
        urgent = await accepted(client, priority=5)
        assert urgent["position"] < plain[-1]["position"]
        urgent = await ended(client, urgent["id"])
        last = await ended(client, plain[-1]["id"])
        assert urgent["finished_at"] < last["finished_at"]


async def test_tenants_take_turns(pipeline: Pipeline) -> None:
    async with opened(pipeline) as (client, app):
        await app.state.service.started()
        best = max(shape.best_batch for shape in app.state.service.engine.capabilities())
        many = [await accepted(client, n=2, user="many") for _ in range(best + 10)]
        one = await accepted(client, user="one")
        finished = (await ended(client, one["id"]))["finished_at"]
        behind = [(await ended(client, job["id"]))["finished_at"] > finished for job in many]
        assert sum(behind) >= 4


async def test_others_jobs_are_not_there(pipeline: Pipeline, tmp_path: Any, assert_error: Check) -> None:
    from tdm_app import keys

    state = State(tmp_path)
    tokens = [(await state.write(keys.create, name, "user"))[1] for name in ("a", "b")]
    async with opened(pipeline, state, auth="on") as (client, _):
        mine, other = ({"authorization": f"Bearer {token}"} for token in tokens)
        job = (await client.post(URL, json={"prompt": PROMPT}, headers=mine)).json()
        path = f"{URL}/{job['id']}"
        assert (await client.get(path, headers=mine)).status_code == 200
        for method, where in (("GET", path), ("DELETE", path), ("GET", f"{path}/events")):
            assert_error(await client.request(method, where, headers=other), 404, "not_found")
        assert (await client.get(URL, headers=other)).json()["data"] == []
        assert len((await client.get(URL, headers=mine)).json()["data"]) == 1
        assert_error(await client.get(path), 401, "invalid_api_key")
    state.close()


async def test_what_waits_at_the_end_is_done_after_the_next_start(pipeline: Pipeline, tmp_path: Any) -> None:
    state = State(tmp_path)
    async with opened(pipeline, state) as (client, app):
        await app.state.service.started()
        jobs = [await accepted(client, n=2, seed=number) for number in range(24)]
    rows = [await state.job(job["id"]) for job in jobs]
    left = [row for row in rows if row is not None and not row.ended]
    assert left  # the engine finished what it had, the rest waits on the disk
    async with opened(pipeline, state) as (client, _):
        for job in jobs:
            done = await ended(client, job["id"])
            assert done["status"] == "succeeded"
            assert [data["seed"] for data in done["result"]["data"]] == [job["seed"], job["seed"] + 1]
    state.close()


async def test_a_job_that_is_no_longer_served_fails_with_its_reason(pipeline: Pipeline, tmp_path: Any) -> None:
    state = State(tmp_path)
    body = {"prompt": PROMPT, "model": "gone", "n": 1, "seed": 1, "tenant": ""}
    job = await state.add_job("", body)
    broken = await state.add_job("", {**body, "model": "default", "no_such_field": 1})
    async with opened(pipeline, state) as (client, _):
        failed = await state.job(job.id)
        while failed is not None and not failed.ended:
            await asyncio.sleep(0.01)
            failed = await state.job(job.id)
        assert failed is not None
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error["code"] == "model_not_found"
        assert (await client.get(URL)).status_code == 200
    row = await state.job(broken.id)
    assert row is not None
    assert row.status == "failed"
    state.close()


async def test_a_deadline_that_passes_while_the_job_waits(pipeline: Pipeline) -> None:
    async with opened(pipeline) as (client, app):
        await app.state.service.started()
        job = await accepted(client, n=10, num_inference_steps=100, allow_untrained_schedule=True)
        late = await client.post(URL, json={"prompt": PROMPT, "deadline_ms": 5})
        assert late.status_code == 429
        await client.delete(f"{URL}/{job['id']}")


async def test_a_job_waits_for_room_on_the_disk(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(pipeline) as (client, app):
        store, full = app.state.service.store, asyncio.Event()

        async def fail(*_: Any) -> str:
            full.set()
            raise OutputError("/a/secret/place is full")

        with monkeypatch.context() as patch:
            patch.setattr(store, "put", fail)
            job = await accepted(client)
            await full.wait()
            direct = await client.post(IMAGES, json={"prompt": PROMPT, "response_format": "url"})
            assert (direct.status_code, direct.json()["error"]["code"]) == (503, "storage_failed")
            assert "secret" not in direct.text
            assert (await client.post(IMAGES, json={"prompt": PROMPT})).status_code == 200
        assert "secret" in caplog.text
        assert (await ended(client, job["id"]))["status"] == "succeeded"


async def test_a_job_whose_engine_dies_is_tried_once_more(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(pipeline) as (client, app):
        await app.state.service.started()
        engine, submit, tries = app.state.service.engine, app.state.service.engine.submit, []

        def dying(*args: Any, **options: Any) -> Any:
            ticket = submit(*args, **options)
            tries.append(ticket)
            if len(tries) != 2:
                ticket._mailbox.settle(EngineFailed("it died"))
            return ticket

        monkeypatch.setattr(engine, "submit", dying)
        assert (await ended(client, (await accepted(client))["id"]))["status"] == "succeeded"
        assert len(tries) == 2
        failed = await ended(client, (await accepted(client))["id"])
        assert (failed["status"], failed["error"]["code"], len(tries)) == ("failed", "engine_failed", 4)


def test_tenants_that_are_gone_are_forgotten(pipeline: Pipeline) -> None:
    queue = JobQueue()
    body = JobRequest(prompt=PROMPT, seed=1)
    for number in range(50):
        asked = understand(body, {"default": pipeline.info}, Settings(), f"user:{number}")
        live = LiveJob(str(number), number, body, asked, 0.0)
        queue.add(live)
        queue.serve(live)
        queue.drop(live.id)
    assert not queue._served


def test_events_can_be_read_line_by_line() -> None:
    lines = [": keep-alive", "", "id: 1", "event: a", 'data: {"x": 1}', "", 'data: {"error": {}}', ""]
    assert list(read(lines)) == [Event("a", {"x": 1}, "1"), Event("message", {"error": {}})]
