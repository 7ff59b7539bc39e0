"""Serves a reward to others: `python -m tdm_finetune.rewards.server REWARD --port 9000`.

A reference for the schema in docs/rewards.md, and the way to give a reward a process, a machine or a set of packages
of its own. `POST /` scores a batch, `GET /health` says which reward this is. There is no authentication, so it listens
on this machine only unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tdm_finetune.rewards import wire
from tdm_finetune.rewards.pool import RewardPool
from tdm_serve.errors import RewardError, TdmServeError

logger = logging.getLogger(__name__)

MAX_BODY_MB = 512
IDLE_S = 60.0  # a connection that sends nothing for so long is closed


class RewardServer(ThreadingHTTPServer):
    """One pool for all connections."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], reward: str, pool: RewardPool) -> None:
        super().__init__(address, Handler)
        self.reward = reward
        self.pool = pool


class Handler(BaseHTTPRequestHandler):
    """Answers in the format it was asked in."""

    server: RewardServer  # pyright: ignore[reportIncompatibleVariableOverride] - only this server uses this handler
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer("json", 200, {"status": "ok", "reward": self.server.reward})
        else:
            self._answer("json", 404, {"error": f"there is nothing at {self.path}; POST / scores, GET /health answers"})

    def do_POST(self) -> None:
        form: wire.Format = "msgpack" if "msgpack" in self.headers.get("content-type", "") else "json"
        try:
            if self.path != "/":
                self._refuse(form, 404, f"there is nothing at {self.path}; POST / scores")
                return
            body = self._body(form)
            if body is None:
                return
            scores = self.server.pool.submit(*wire.unpack_request(form, body)).result()
        except wire.BadRequest as error:
            self._answer(form, 400, {"error": str(error)})
        except RewardError as error:
            self._answer(form, 500, {"error": str(error)})
        except TdmServeError as error:  # msgpack that is not installed
            self._answer("json", 415, {"error": str(error)})
        else:
            self._answer(form, 200, {"scores": scores.tolist()})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        logger.info("%s: %s", self.address_string(), format % args)

    def _body(self, form: wire.Format) -> bytes | None:
        """The body, or None after it was refused for its length."""
        length = self.headers.get("content-length", "")
        if not length.isdecimal():
            self._refuse(form, 411, "the request needs a content-length")
            return None
        if int(length) > MAX_BODY_MB * 2**20:
            self._refuse(form, 413, f"the body has {int(length) >> 20} MB; at most {MAX_BODY_MB}")
            return None
        return self.rfile.read(int(length))

    def _refuse(self, form: wire.Format, status: int, error: str) -> None:
        """Answers without having read the body, so the connection cannot go on."""
        self.close_connection = True
        self._answer(form, status, {"error": error})

    def _answer(self, form: wire.Format, status: int, content: Mapping[str, Any]) -> None:
        body = wire.pack(form, content)
        self.send_response(status)
        self.send_header("content-type", wire.TYPES[form])
        self.send_header("content-length", str(len(body)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until interrupted; 1 with a sentence on stderr where it cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m tdm_finetune.rewards.server", description="Serves a reward over HTTP."
    )
    parser.add_argument("reward", help="in the short form, e.g. scenes:1.0,jpeg:0.1")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=9000, help="0 takes any free one (default: 9000)")
    parser.add_argument("--workers", type=int, default=1, help="batches scored at once (default: 1)")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for one batch (default: 60)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    try:
        with RewardPool(given.reward, workers=given.workers, timeout_s=given.timeout_s) as pool:
            return _serve(given.host, given.port, given.reward, pool)
    except TdmServeError as error:
        sys.stderr.write(f"error: {error}\n")
    except (OSError, OverflowError) as error:
        sys.stderr.write(f"error: cannot listen on {given.host}:{given.port}: {error}\n")
    return 1


def _serve(host: str, port: int, reward: str, pool: RewardPool) -> int:
    # a supervisor ends it with SIGTERM, and a shell's background jobs are born deaf to SIGINT
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with RewardServer((host, port), reward, pool) as server:
        # for whoever started it with --port 0
        sys.stdout.write(f"serving {reward} on http://{host}:{server.server_address[1]}\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
