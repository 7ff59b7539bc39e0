"""Early visitors of a server that warms up slowly, and visitors of one whose device hangs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from servers import metric, serving, wait_for, wait_ready
from sse_reader import parse

from tdm_app.api import create_app
from tdm_app.settings import Settings
from tdm_serve import AsyncEngine
from tdm_serve.scheduler import Policy
from tests.tdm_serve.toy_device import SlowStart

IMAGES, JOBS = "/v1/images/generations", "/v1/jobs"
BODY: dict[str, Any] = {"prompt": "a star", "model": "toy"}
QUIET_S = 0.05
HANG_S = 0.2


@pytest.fixture
def device() -> Iterator[SlowStart]:
    device = SlowStart()
    yield device
    device.warm.set()
    device.gate.set()


@pytest.fixture
def app(device: SlowStart, tmp_path: Path) -> FastAPI:
    engine = AsyncEngine(device, policy=Policy(slack=10.0), profile=tmp_path, hang_s=HANG_S)
    return create_app(engine, Settings.model_validate({"keepalive_s": QUIET_S}), page=False)


@pytest.fixture
def url(app: FastAPI, device: SlowStart) -> Iterator[str]:
    with serving(app) as address:
        yield address
        device.warm.set()
        device.gate.set()


def opened(url: str, **body: Any) -> socket.socket:
    content = json.dumps({**BODY, **body}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    line = socket.create_connection((host, int(port)), timeout=10)
    line.sendall(head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content)
    return line


def in_flight(url: str) -> float:
    return metric(url, "tdm_serve:http_requests_in_flight") - 1  # the one that asks


def test_a_stream_is_kept_alive_until_the_model_is_warm(url: str, device: SlowStart) -> None:
    with httpx.stream("POST", url + IMAGES, json={**BODY, "stream": True}, timeout=30) as answer:
        assert answer.status_code == 200
        assert "x-eta-ms" not in answer.headers
        lines = answer.iter_lines()
        heard = [next(lines) for _ in range(6)]
        assert heard[::2] == [": keep-alive"] * 3
        device.warm.set()
        events, _ = parse("\n".join(lines) + "\n")
    assert [event.name for event in events] == ["image_generation.completed"]


def test_what_is_wrong_is_a_plain_error_before_the_model_is_warm(url: str) -> None:
    answer = httpx.post(url + IMAGES, json={**BODY, "prompt": " ", "stream": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_who_leaves_before_the_model_is_warm_costs_nothing(url: str, device: SlowStart, stream: bool) -> None:
    lines = [opened(url, stream=stream) for _ in range(3)]
    wait_for(lambda: in_flight(url) == 3)
    for line in lines:
        line.close()
    wait_for(lambda: in_flight(url) == 0, 5)
    device.warm.set()
    wait_ready(url)
    assert metric(url, "tdm_serve:requests_accepted_total") == 0


def test_a_deadline_holds_while_the_model_warms_up(url: str, device: SlowStart) -> None:
    late = httpx.post(url + IMAGES, json={**BODY, "deadline_ms": 100})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")
    assert "while the model warmed up" in late.json()["error"]["message"]
    with httpx.stream("POST", url + IMAGES, json={**BODY, "deadline_ms": 100, "stream": True}) as answer:
        assert '"deadline_passed"' in answer.read().decode()
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(httpx.post, url + IMAGES, json={**BODY, "deadline_ms": 60_000}, timeout=30)
        wait_for(lambda: in_flight(url) == 1)
        device.warm.set()
        assert patient.result().status_code == 200


def test_jobs_are_taken_heard_and_called_off_before_the_model_is_warm(url: str, device: SlowStart) -> None:
    kept, dropped = (httpx.post(url + JOBS, json=BODY).json() for _ in range(2))
    assert (kept["status"], kept["eta_ms"]) == ("queued", None)
    with httpx.stream("GET", f"{url}{JOBS}/{kept['id']}/events", timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: job.status"
        assert ": keep-alive" in [next(lines) for _ in range(6)]
        assert httpx.delete(f"{url}{JOBS}/{dropped['id']}").json()["status"] == "cancelled"
        device.warm.set()
        assert "event: job.succeeded" in list(lines)
    assert metric(url, "tdm_serve:images_total") == 1


def test_a_warm_up_that_fails_is_an_error_in_the_stream(app: FastAPI, device: SlowStart) -> None:
    def broken(_stage: str, _batch: int) -> None:
        raise ValueError("broken")

    body = {**BODY, "stream": True}
    with serving(app) as url, httpx.stream("POST", url + IMAGES, json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": keep-alive"
        device.trip = broken
        device.warm.set()
        [error] = [line for line in lines if line.startswith("data: ")]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_a_hung_device_is_not_ready_refuses_and_comes_back(url: str, device: SlowStart) -> None:
    device.warm.set()
    wait_ready(url)
    job = httpx.post(url + JOBS, json={**BODY, "n": 2}).json()
    wait_for(lambda: httpx.get(f"{url}{JOBS}/{job['id']}").json()["status"] == "succeeded")
    device.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(httpx.post, url + IMAGES, json=BODY, timeout=30)
        wait_for(lambda: in_flight(url) == 1)
        waiting = httpx.post(url + JOBS, json=BODY)
        assert waiting.status_code == 202
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        said = httpx.get(f"{url}/readyz").json()["error"]
        assert said["code"] == "engine_failed"
        assert "the device hangs: " in said["message"]
        for path in (IMAGES, JOBS):
            refused = httpx.post(url + path, json=BODY)
            assert (refused.status_code, refused.json()["error"]) == (503, said)
            assert int(refused.headers["retry-after-ms"]) >= 1000
        capabilities = httpx.get(f"{url}/v1/capabilities").json()
        assert (capabilities["ready"], capabilities["degraded"]) == (False, said["message"])
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert metric(url, "tdm_serve:device_hangs_total") == 1
        assert metric(url, "tdm_serve:ready") == 0
        device.gate.set()
        assert stuck.result().status_code == 200
    wait_ready(url)
    assert httpx.post(url + IMAGES, json=BODY).status_code == 200
    wait_for(lambda: httpx.get(f"{url}{JOBS}/{waiting.json()['id']}").json()["status"] == "succeeded")
