"""Real parts only: the embedded checkpoint, the service in this process, and the service as a process of its own."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tdm_app.api import create_app
from tdm_serve import AsyncEngine, Pipeline

sys.path.append(str(Path(__file__).parent))  # --import-mode=importlib leaves the path alone

from server_process import ServerProcess


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def client(pipeline: Pipeline, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    """The API without the page, in this process, started and warm."""
    app = create_app(AsyncEngine(pipeline), page=False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        await app.state.service.started()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))


@pytest.fixture(scope="session")
def assert_error() -> Callable[..., dict[str, Any]]:
    """Checks that an answer is an error in OpenAI's shape, and returns the error."""

    def check(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
        assert response.status_code == status, response.text
        body = response.json()
        assert list(body) == ["error"]
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == (code, param), error
        kinds = {429: "rate_limit_error"}
        assert error["type"] == ("server_error" if status >= 500 else kinds.get(status, "invalid_request_error"))
        assert error["message"]
        assert response.headers["x-request-id"]
        return error

    return check


@pytest.fixture
def start_server(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers for one test, and stops those that it leaves running."""
    running: list[ServerProcess] = []
    with (tmp_path / "server.log").open("w+") as log:

        def start(*options: str, port: int | None = None) -> ServerProcess:
            running.append(ServerProcess(log, environment, *options, port=port))
            return running[-1]

        yield start
        for server in running:
            server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[ServerProcess]:
    """One server for all tests that only talk to it."""
    with (tmp_path_factory.mktemp("server") / "server.log").open("w+") as log:
        process = ServerProcess(log, environment)
        try:
            process.wait_ready()
            yield process
        finally:
            process.stop()
