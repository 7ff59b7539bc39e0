"""`run_server`: from a model's name to a listening service, and back to exit code 0 on SIGTERM or Ctrl+C.

The port is taken before the model is loaded, so a port in use is reported at once and not after a minute.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_serve.errors import ConfigError, PortInUse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tdm_serve import AsyncEngine

log = logging.getLogger(__name__)

GRACE_S = 5  # for connections that are still open when all requests have been finished or given up


def run_server(settings: Settings) -> int:
    """Serves until a signal comes; 0 then. Port 0 takes any free one. Raises TdmServeError where it cannot start.

    What can be found wrong is found in the order of its price: the port, the state, the model.
    """
    from tdm_app.logs import configure_logs

    configure_logs(settings.log_format, settings.log_level)
    with (
        contextlib.suppress(_Stopped),
        _stop_on_signals(),
        contextlib.closing(listen(settings.host, settings.port)) as listener,
    ):
        settings = settings.bound_to(is_loopback(listener.getsockname()[0]))
        with contextlib.closing(State(settings.state_dir)) as state:
            _warn(settings, state)
            _serve_models(settings, state, listener)
    return 0


def _serve_models(settings: Settings, state: State, listener: socket.socket) -> None:
    from tdm_app.api import create_app

    engine = engine_of(settings)
    app = create_app(engine, settings, state=state, page=settings.page)
    sys.stdout.write(f"{announcement(', '.join(engine.infos), listener, settings.page)}\n")
    sys.stdout.flush()
    _serve(app, listener, settings.drain_s)


def engine_of(settings: Settings) -> AsyncEngine:
    """The models of the settings, loaded, behind a queue. Raises TdmServeError for what cannot be served."""
    from tdm_serve import AsyncEngine
    from tdm_serve.engine import Engine
    from tdm_serve.scheduler import Policy
    from tdm_serve.validation import parse_size

    engine = Engine.load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        engine=settings.engine,
        adapters=settings.adapters,
        strict=settings.strict,
        memory_mb=settings.memory_mb,
        cache_mb=settings.cache_mb,
        max_memory_gb=settings.max_memory,
        offload=settings.offload,
        quantise=settings.quantise,
        random_weights=settings.random_weights,
        growing=settings.online_training,
    )
    return AsyncEngine(
        engine,
        policy=Policy(max_waiting=settings.max_waiting, max_wait_ms=settings.max_wait_s * 1000),
        max_batch=settings.max_batch,
        profile=settings.state_dir,
        warm=[parse_size(size) for size in settings.warm],
        hang_s=settings.hang_s,
    )


def _serve(app: FastAPI, listener: socket.socket, drain_s: float) -> None:
    """Runs the app until a signal or a failed start of the engine, whose error it raises."""
    import uvicorn

    from tdm_app.drain import Drain
    from tdm_app.service import Service

    service: Service = app.state.service
    drain: Drain = app.state.drain

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.stopping.set()
            if service.failure is None and not await drain.finish(drain_s):
                log.warning("%d requests were not finished within %g s", drain.running, drain_s)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S
    )
    server = Server(config)
    service.on_start = spare_collections
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def spare_collections() -> None:
    """What was loaded stays, so the garbage collector need not look at it again.

    A full collection of a loaded server held all threads for 0.3 s, and every promise given before was late by that.
    """
    gc.collect()
    gc.freeze()


def _warn(settings: Settings, state: State) -> None:
    """Says what an operator may not have meant: an open door, or one that nobody has a key for."""
    if settings.auth == "off" and settings.allow_open:
        log.warning("there is no authentication: everybody who can reach %s can make pictures here", settings.host)
    if settings.online_training and not settings.feedback:
        log.warning("online_training is on, but feedback is off, so there is nothing to train from")
    if settings.auth == "on" and settings.admin_key is None and not state.has_keys():
        log.warning("no API key is in use, so nobody is let in; `tdm-serve keys create NAME` makes one")


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
