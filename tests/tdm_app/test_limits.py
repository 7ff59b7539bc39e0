"""Bodies over the limit, clients that leave: answered or forgotten, and never in the way of the next request."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tdm_app.api import create_app
from tdm_app.settings import Settings
from tdm_serve import AsyncEngine, Pipeline

URL = "/v1/images/generations"
JSON = {"content-type": "application/json"}
MIB = 2**20
Check = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("sent_mib", [1.1, 12, 40])
def test_oversize_body(server: Any, assert_error: Check, sent_mib: float) -> None:
    body = json.dumps({"prompt": "x" * int(sent_mib * MIB)})
    response = httpx.post(server.url + URL, content=body, headers=JSON, timeout=30)
    assert "1048576 bytes" in assert_error(response, 413, "body_too_large")["message"]


def test_oversize_body_of_undeclared_length(server: Any, assert_error: Check) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(24):
            yield b" " * 65_536

    response = httpx.post(server.url + URL, content=chunks(), headers=JSON, timeout=30)
    assert_error(response, 413, "body_too_large")


def test_oversize_body_for_the_page(server: Any, assert_error: Check) -> None:
    response = httpx.post(f"{server.url}/gradio_api/queue/join", content=b" " * 2 * MIB, headers=JSON, timeout=30)
    assert_error(response, 413, "body_too_large")


def test_body_at_the_limit(server: Any) -> None:
    body = b'{"prompt": "a red circle"}'
    response = httpx.post(server.url + URL, content=body + b" " * (MIB - len(body)), headers=JSON, timeout=30)
    assert response.status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(("size", "status"), [(64, 200), (65, 413)])
async def test_the_limit_is_a_setting(pipeline: Pipeline, size: int, status: int) -> None:
    app = create_app(AsyncEngine(pipeline), Settings(max_body_bytes=64), page=False)
    body = b'{"prompt": "a red circle"}'.ljust(size)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.post(URL, content=body, headers=JSON)).status_code == status


def request_bytes(length: int, body: bytes) -> bytes:
    head = f"POST {URL} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(request_bytes(1000, b'{"prompt": '), id="in the middle of the body"),
        pytest.param(request_bytes(26, b'{"prompt": "a red circle"}'), id="while the picture is made"),
        pytest.param(request_bytes(33, b'{"prompt": "a red circle","n":10}'), id="while ten pictures are made"),
    ],
)
def test_a_client_that_leaves(server: Any, sent: bytes) -> None:
    before = server.errors()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
            line.sendall(sent)
            time.sleep(0.02)
    response = httpx.post(server.url + URL, json={"prompt": "a red circle", "seed": 7}, timeout=60)
    assert response.status_code == 200
    assert server.errors() == before  # nothing was logged: it is not an error of ours
