"""The process: taken ports, signals, and what it prints."""

from __future__ import annotations

import gc
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tdm_app.server import announcement, is_loopback, listen, run_server, spare_collections
from tdm_app.settings import Settings
from tdm_serve.errors import ConfigError, PortInUse

Start = Callable[..., Any]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_exit_code_0(start_server: Start, number: int) -> None:
    server = start_server("--no-page")
    server.wait_ready()
    assert server.stop(number) == 0
    (line,) = server.output.splitlines()
    assert line == f"serving default: API {server.url}/v1, docs {server.url}/docs"
    assert "Traceback" not in server.errors()


def test_a_full_collection_of_a_loaded_server_looks_at_little() -> None:
    loaded = len(gc.get_objects())
    try:
        spare_collections()
        assert len(gc.get_objects()) < loaded / 10
    finally:
        gc.unfreeze()


def test_a_signal_while_the_model_loads(start_server: Start) -> None:
    server = start_server()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # the port is taken before the model is loaded
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", server.port)) == 0:
                break
        time.sleep(0.01)
    assert server.stop() == 0
    assert "Traceback" not in server.errors()


def test_running_requests_are_finished_first(start_server: Start) -> None:
    server = start_server("--no-page", "--max-batch", "1")
    server.wait_ready()
    body = b'{"prompt": "a red circle", "n": 10}'
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        head = f"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        line.sendall(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + body)
        time.sleep(0.05)
        assert server.stop() == 0
        answer = b"".join(iter(lambda: line.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b'"b64_json"') == 10


@pytest.mark.slow
def test_new_requests_are_refused_while_it_finishes(start_server: Start, assert_error: Callable[..., Any]) -> None:
    server = start_server("--no-page", "--max-batch", "1")
    server.wait_ready()
    url = f"{server.url}/v1/images/generations"
    body = {"prompt": "a red circle", "n": 10, "num_inference_steps": 50, "allow_untrained_schedule": True}
    with ThreadPoolExecutor() as pool:
        running = pool.submit(httpx.post, url, json=body, timeout=60)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert_error(httpx.post(url, json=body, timeout=60), 503, "unavailable")
        assert_error(httpx.get(f"{server.url}/readyz", timeout=60), 503, "unavailable")
        assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
        assert not running.done()
        assert len(running.result().json()["data"]) == 10
    assert server.stop(signal.SIGCONT) == 0


@pytest.mark.slow
def test_a_state_folder_of_another_server(start_server: Start, tmp_path: Path) -> None:
    folder = ("--state-dir", str(tmp_path / "state"))
    first = start_server("--no-page", *folder)
    first.wait_ready()
    second = start_server("--no-page", *folder)
    assert second.stop(signal.SIGCONT) == 2
    assert f"error: {tmp_path}/state is in use by another server (process {first.process.pid});" in second.errors()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    third = start_server("--no-page", *folder)
    third.wait_ready()
    assert third.stop() == 0


@pytest.mark.slow
def test_open_tabs_do_not_hold_it_up(start_server: Start) -> None:
    server = start_server()
    server.wait_ready()
    with httpx.stream("GET", f"{server.url}/gradio_api/heartbeat/somebody", timeout=30) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        assert "ALIVE" in next(lines)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 15
        assert "ALIVE" not in list(lines)
    assert server.errors().count("ERROR") == 0


def test_a_port_in_use(start_server: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start_server(port=port)
        assert server.stop(signal.SIGCONT) == 2  # a signal that changes nothing: it ends by itself
    error = server.errors().strip()
    assert re.fullmatch(rf"error: .*{port}.* in use.*", error), error
    assert server.output == ""


def test_two_servers_cannot_share_a_port() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(PortInUse, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])


def test_the_port_is_checked_before_the_model() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(PortInUse):
        run_server(Settings(model=("no-such-model",), port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [("127.0.0.1", 70_000, "0 to 65535"), ("127.0.0.1", -1, "0 to 65535"), ("no such host", 0, "no such host")],
)
def test_bad_addresses(host: str, port: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        listen(host, port)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(("host", "local"), [("0.0.0.0", False), ("::", False), ("127.0.0.1", True), ("::1", True)])
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_an_open_address_needs_keys_or_a_flag(start_server: Start) -> None:
    server = start_server("--host", "0.0.0.0", "--auth", "off")
    assert server.stop(signal.SIGCONT) == 2  # a signal that changes nothing: it ends by itself
    error = server.errors()
    assert error.startswith("error: host is '0.0.0.0', which others can reach, and auth is 'off'; allowed: ")
    assert "--allow-open" in error


def test_port_0_announces_the_real_one() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        expected = f"page http://127.0.0.1:{port}/, API http://127.0.0.1:{port}/v1, docs http://127.0.0.1:{port}/docs"
        assert announcement("default", listener, page=True) == f"serving default: {expected}"
