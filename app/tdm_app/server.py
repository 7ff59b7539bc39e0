"""`run_server`: from a model's name to a listening service, and back to exit code 0 on SIGTERM or Ctrl+C.

The port is taken before the model is loaded, so a port in use is reported at once and not after a minute.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tdm_app.settings import Settings
from tdm_serve.errors import ConfigError, PortInUse

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE_S = 30  # for requests that run when the signal comes; pictures take far less


def run_server(settings: Settings) -> int:
    """Serves until a signal comes; 0 then. Port 0 takes any free one. Raises TdmServeError where it cannot start."""
    with contextlib.suppress(_Stopped), _stop_on_signals(), _listen(settings) as listener:
        from tdm_app.api import create_app
        from tdm_serve import AsyncEngine, Pipeline

        settings = settings.bound_to(is_loopback(listener.getsockname()[0]))
        pipeline = Pipeline.from_pretrained(
            settings.model[0], device=settings.device, dtype=settings.dtype, backend=settings.backend
        )
        app = create_app(AsyncEngine(pipeline, max_batch=settings.max_batch or 8), page=settings.page)
        sys.stdout.write(f"{announcement(pipeline.info.id, listener, settings.page)}\n")
        sys.stdout.flush()
        _serve(app, listener)
    return 0


def _listen(settings: Settings) -> contextlib.closing[socket.socket]:
    return contextlib.closing(listen(settings.host, settings.port))


def _serve(app: FastAPI, listener: socket.socket) -> None:
    """Runs the app until a signal or a failed start of the engine, whose error it raises."""
    import uvicorn

    from tdm_app.service import Service

    service: Service = app.state.service

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.stopping.set()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S
    )
    server = Server(config)
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Listening from the start: two servers could else both bind and one lose much later."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; allowed: 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not an address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for old connections
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        _cannot_listen(host, port, error)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> NoReturn:
    if error.errno == errno.EADDRINUSE:
        raise PortInUse(f"{host}:{port} is in use by another process; choose another --port") from error
    raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def announcement(model: str, listener: socket.socket, page: bool) -> str:
    """The one line that is printed: what is served, and where."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    where = f"page {url}/, API {url}/v1, docs {url}/docs" if page else f"API {url}/v1, docs {url}/docs"
    return f"serving {model}: {where}"


class _Stopped(BaseException):
    """A signal asked to stop. Not an Exception, so that no handler in a library takes it for a failure."""


@contextlib.contextmanager
def _stop_on_signals() -> Generator[None]:
    """SIGTERM and SIGINT raise _Stopped, while the model loads and (uvicorn hands them on) after serving."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
