"""A client that leaves takes its pictures with it, within one evaluation, on every route."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import metric, serving, wait_for, wait_ready

from tdm_app.api import create_app
from tdm_serve import AsyncEngine, Pipeline

STEPS = 100
CANCELLED, STEPS_DONE = "tdm_serve:requests_cancelled_total", "tdm_serve:steps_total"
RUNNING, WAITING = "tdm_serve:num_pictures_running", "tdm_serve:num_pictures_waiting"


@pytest.fixture(scope="module")
def url(pipeline: Pipeline) -> Iterator[str]:
    with serving(create_app(AsyncEngine(pipeline), page=False)) as address:
        wait_ready(address)
        yield address


def ask(url: str, **body: Any) -> socket.socket:
    """Sends a request that takes long, and leaves the line open."""
    content = json.dumps(
        {"prompt": "two red circles", "num_inference_steps": STEPS, "allow_untrained_schedule": True, "n": 2, **body}
    ).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    line = socket.create_connection((host, int(port)), timeout=10)
    line.sendall(head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content)
    return line


def idle(url: str) -> bool:
    return metric(url, RUNNING) == metric(url, WAITING) == 0


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("evaluations", [0, 1, 5])
def test_the_device_is_free_within_one_evaluation(url: str, stream: bool, evaluations: int) -> None:
    cancelled, steps = metric(url, CANCELLED), metric(url, STEPS_DONE)
    line = ask(url, stream=stream, partial_images=3 if stream else 0)
    wait_for(lambda: metric(url, RUNNING) >= 1 and metric(url, STEPS_DONE) >= steps + evaluations)
    at_leaving = metric(url, STEPS_DONE)
    line.close()
    wait_for(lambda: metric(url, CANCELLED) == cancelled + 1, 5)
    at_cancelling = metric(url, STEPS_DONE)
    wait_for(lambda: idle(url), 5)
    assert metric(url, STEPS_DONE) <= at_cancelling + 2  # two pictures in batches of one or two
    assert at_cancelling - at_leaving < STEPS


def test_who_waits_and_leaves_is_never_started(url: str) -> None:
    with ask(url, n=1):
        wait_for(lambda: metric(url, RUNNING) >= 1)
        before = metric(url, CANCELLED)
        lines = [ask(url, n=4, num_inference_steps=4) for _ in range(3)]
        wait_for(lambda: metric(url, WAITING) + metric(url, RUNNING) >= 13)
        for line in lines:
            line.close()
        wait_for(lambda: metric(url, CANCELLED) == before + 3, 5)
        wait_for(lambda: metric(url, WAITING) == 0, 5)
    wait_for(lambda: idle(url), 20)


def test_leaving_disturbs_nobody(url: str) -> None:
    alone = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a star", "seed": 1}, timeout=60).json()
    with ask(url):
        time.sleep(0.05)
    together = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a star", "seed": 1}, timeout=60).json()
    assert alone["data"][0]["b64_json"] == together["data"][0]["b64_json"]
    wait_for(lambda: idle(url), 20)


def test_listening_to_a_job_is_not_owning_it(url: str) -> None:
    job = httpx.post(
        f"{url}/v1/jobs", json={"prompt": "a star", "num_inference_steps": 20, "allow_untrained_schedule": True}
    ).json()
    with httpx.stream("GET", f"{url}/v1/jobs/{job['id']}/events", timeout=30) as stream:
        next(stream.iter_lines())
    wait_for(lambda: httpx.get(f"{url}/v1/jobs/{job['id']}").json()["status"] == "succeeded")
