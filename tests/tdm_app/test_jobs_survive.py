"""kill -9 in the middle of many jobs: every accepted one ends, none is made twice, and the pixels are the same."""

from __future__ import annotations

import base64
import io
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from servers import metric, wait_for

PROMPTS = ("two red circles", "a blue ring left of a star", "a green square", 'the word "CAT" in red')
UNTRAINED = {"num_inference_steps": 3, "allow_untrained_schedule": True}
Start = Callable[..., Any]


def pixels(data: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))


def accept(client: httpx.Client, number: int) -> dict[str, Any]:
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "n": 1 + number % 3} | (UNTRAINED if number % 5 == 1 else {})
    response = client.post("/v1/jobs", json=body | ({} if number % 4 == 0 else {"seed": number * 10}))
    assert response.status_code == 202, response.text
    return body | response.json()


def all_of(client: httpx.Client, jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {job["id"]: client.get(f"/v1/jobs/{job['id']}").json() for job in jobs}


def wait_ended(client: httpx.Client, jobs: list[dict[str, Any]], count: int) -> None:
    def happened() -> bool:
        listed = client.get("/v1/jobs", params={"limit": 100}).json()["data"]
        assert {job["id"] for job in listed} == {job["id"] for job in jobs}
        return sum(job["status"] not in {"queued", "running"} for job in listed) >= count

    wait_for(happened, 250)


@pytest.mark.parametrize(("count", "kills"), [pytest.param(20, 1, id="20"), pytest.param(100, 2, id="100")])
@pytest.mark.slow
def test_kill_9(start_server: Start, count: int, kills: int) -> None:
    server = start_server("--no-page")
    server.wait_ready()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        jobs = [accept(client, number) for number in range(count - kills)]
        for kill in range(1, kills + 1):
            wait_ended(client, jobs, count * kill // (kills + 3))
            jobs.append(accept(client, count - kill))  # in the last moment before the end
            before = all_of(client, jobs)
            server.stop(signal.SIGKILL)
            server = start_server("--no-page", port=server.port)
            server.wait_ready()
        wait_ended(client, jobs, count)
        after = all_of(client, jobs)
        made = metric(server.url, "tdm_serve:images_total")
        check(client, jobs, before, after, made)
    assert server.stop() == 0
    assert "Traceback" not in server.errors()


def check(
    client: httpx.Client,
    jobs: list[dict[str, Any]],
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    made: float,
) -> None:
    assert {job["status"] for job in after.values()} == {"succeeded"}
    done = [name for name, job in before.items() if job["status"] == "succeeded"]
    assert 0 < len(done) < len(jobs)
    for name in done:  # what had ended was not touched
        assert after[name]["finished_at"] == before[name]["finished_at"]
        assert after[name]["result"] == before[name]["result"]
    assert made <= sum(job["n"] for name, job in after.items() if name not in done)  # nothing was made twice
    images = [data["image_id"] for job in after.values() for data in job["result"]["data"]]
    assert len(images) == len(set(images)) == sum(job["n"] for job in jobs)
    for job in jobs:
        again = {name: job[name] for name in ("prompt", "n", "seed", *UNTRAINED) if name in job}
        direct = client.post("/v1/images/generations", json=again).json()["data"]
        for mine, other in zip(after[job["id"]]["result"]["data"], direct, strict=True):
            facts = ("seed", "nfe", "untrained_schedule")
            assert [mine[fact] for fact in facts] == [other[fact] for fact in facts]
            assert np.array_equal(pixels(mine), pixels(other))


@pytest.mark.slow
def test_sigterm_leaves_what_waits_for_the_next_start(start_server: Start) -> None:
    server = start_server("--no-page")
    server.wait_ready()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        jobs = [accept(client, number) for number in range(12)]
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 20
        server = start_server("--no-page", port=server.port)
        server.wait_ready()
        wait_ended(client, jobs, len(jobs))
        assert {job["status"] for job in all_of(client, jobs).values()} == {"succeeded"}
