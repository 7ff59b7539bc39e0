"""A disk that cannot be written: what needs it is refused, nothing else is harmed, and it passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tdm_app.api import create_app
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_serve import AsyncEngine, Pipeline

pytestmark = pytest.mark.anyio
Check = Callable[..., dict[str, Any]]
BODY = {"prompt": "a red circle", "seed": 3}


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.close()


@pytest.fixture
async def client(state: State, pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(AsyncEngine(pipeline), Settings(feedback=True), state, page=False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        await app.state.service.started()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://localhost"))


def writable(state: State, yes: bool) -> None:
    """Makes every write of the state fail, as on a disk that was remounted, or work again."""
    state._write_connection.execute(f"PRAGMA query_only = {'OFF' if yes else 'ON'}")


async def test_a_full_disk(state: State, client: httpx.AsyncClient, assert_error: Check) -> None:
    accepted = [(await client.post("/v1/jobs", json=BODY | {"n": 10})).json()["id"] for _ in range(4)]
    writable(state, False)
    error = assert_error(await client.post("/v1/jobs", json=BODY), 503, "storage_failed")
    assert error["message"] == "the service cannot write its state; its log says why"
    picture = await client.post("/v1/images/generations", json=BODY)
    assert picture.status_code == 200
    assert picture.json()["data"][0]["b64_json"]
    rating = {"image_id": picture.json()["data"][0]["image_id"], "rating": "up"}
    assert_error(await client.post("/v1/feedback", json=rating), 404, "not_found")
    assert (await client.get("/readyz")).status_code == 200
    assert (await client.get(f"/v1/jobs/{accepted[0]}")).status_code == 200
    await asyncio.sleep(1)  # jobs are done meanwhile, and cannot be written down
    writable(state, True)
    async with asyncio.timeout(60):
        for job_id in accepted:
            while (job := (await client.get(f"/v1/jobs/{job_id}")).json())["status"] != "succeeded":
                assert job["status"] in {"queued", "running"}
                await asyncio.sleep(0.1)
            assert len(job["result"]["data"]) == 10
    assert (await client.post("/v1/jobs", json=BODY)).status_code == 202
