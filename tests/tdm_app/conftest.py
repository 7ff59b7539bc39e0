"""Real parts only: the embedded checkpoint, the service in this process, and the service as a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tdm_app.api import create_app
from tdm_serve import AsyncEngine, Pipeline

sys.path.append(str(Path(__file__).parent))  # --import-mode=importlib leaves the path alone
START_S = 240


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """`tdm-serve serve` as a user runs it."""

    def __init__(self, log: Any, environment: dict[str, str], *options: str, port: int | None = None) -> None:
        self.port = port if port is not None else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "tdm_serve.cli", "serve", "--device", "cpu", "--port", str(self.port)]
        self.log = log
        self.state_dir = Path(log.name).parent / f"state-{self.port}"  # the same for the next server on this port
        variables = {"TDM_SERVE_STATE_DIR": str(self.state_dir)} | environment
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=variables
        )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server exited with {self.process.returncode}: {self.errors()}"
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_S} s: {self.errors()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.output = self.process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode

    def errors(self) -> str:
        self.log.seek(0)
        return self.log.read()


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
