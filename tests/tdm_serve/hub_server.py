"""A small model hub over HTTP: what Hugging Face's client asks of the real one, from folders on this machine.

It lists repositories and their files, answers HEAD and ranged GET, refuses what is gated, and can break off in the
middle of a file. `requests` tells what was asked, in order.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A folder under a commit. `gated` is the status that its files answer with, if any; another than 401
    and 403 is a server's own trouble.
    """

    folder: Path
    commit: str
    gated: int = 0

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@dataclass
class Asked:
    method: str
    path: str
    range: str | None


@dataclass
class Hub:
    """`breaks` says after how many bytes the next answers of a file's name end: one number for each answer."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict[str, Repository])
    requests: list[Asked] = field(default_factory=list[Asked])
    breaks: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    connections: list[socket.socket] = field(default_factory=list[socket.socket])

    def add(self, name: str, folder: Path, commit: str | None = None, gated: int = 0) -> Repository:
        commit = commit or hashlib.sha1(name.encode()).hexdigest()
        self.repositories[name] = Repository(folder, commit, gated)
        return self.repositories[name]

    def gets(self, name: str) -> list[Asked]:
        """The requests for a file's content."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Asked(self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?", path):
            self._listing(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._error(404, "EntryNotFound")

    def _repository(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(401, "RepoNotFound")  # as the real one answers who is not logged in
        elif revision not in (repository.commit, "main"):
            self._error(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _listing(self, name: str, what: str, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if what == "revision":
            siblings = [{"rfilename": str(path.relative_to(repository.folder))} for path in repository.files()]
            body: Any = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings}
        else:
            body = [
                {
                    "type": "file",
                    "path": path.relative_to(repository.folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in repository.files()
            ]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, place: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if repository.gated:
            self._error(repository.gated, "GatedRepo" if repository.gated in (401, 403) else "Internal")
            return
        path = repository.folder / place
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        data = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        start = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, self._cut(place))

    def _cut(self, place: str) -> int | None:
        left = self.hub.breaks.get(Path(place).name)
        return left.pop(0) if left and self.command == "GET" else None

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def running() -> Generator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), cast(Any, type("Bound", (Handler,), {"hub": hub})))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        for connection in hub.connections:  # clients keep theirs open, and would still be answered
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
        thread.join()
