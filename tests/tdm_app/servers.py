"""An app behind a real socket in a thread of the test's process, and what its metrics say."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

PATIENCE_S = 60.0


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Its address, until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_ready(url: str) -> None:
    wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200)


def wait_for(happened: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {patience_s:g} s"
        time.sleep(0.01)


def metric(url: str, name: str) -> float:
    """The sum over all labels of one metric of a server."""
    return value_of(httpx.get(f"{url}/metrics").text, name)


def value_of(text: str, name: str) -> float:
    return sum(float(found) for found in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
