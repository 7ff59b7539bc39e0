"""Picture files: results of jobs, and what `response_format: url` points to. Links are signed and end by themselves.

A file's id holds the second until which it is kept and 128 random bits, and is its name: nothing else has to be
remembered, and nothing that a client sends is taken for a path. A link is good for the one who has it, like a key, so
it works in an `<img>` without one; who lacks the signature learns nothing, not even which ids exist.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from tdm_app.refusal import Refused, refusal
from tdm_serve.errors import InvalidRequest, OutputError
from tdm_serve.files import write_atomically

log = logging.getLogger(__name__)

ID = re.compile(r"file_([0-9a-f]{8})_[A-Za-z0-9_-]{22}\.(png|jpeg|webp)")
MIB = 2**20
KEY_BYTES = 32


class Store:
    """Files in `folder/pictures`, at most `cap_bytes` of them; the oldest go first. Its methods are for one loop."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        """OutputError where the folder cannot be written."""
        self.folder = folder / "pictures"
        self.cap_bytes = cap_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._key = _key(folder / "links.key")
        self._lock = threading.Lock()
        self._sizes = self._found()  # id -> bytes, oldest first

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    async def put(self, data: bytes, extension: str, keep_s: float) -> str:
        """Keeps a picture file for a time and returns its id; `extension` is png, jpeg or webp.

        OutputError without space, InvalidRequest for a picture that is larger than the whole store.
        """
        return await asyncio.to_thread(self._put, data, extension, keep_s)

    async def get(self, file_id: str) -> bytes | None:
        """The bytes; None for a file that is not there any more, and for what is no id."""
        return await asyncio.to_thread(self._get, file_id)

    async def remove(self, file_ids: Iterable[str]) -> None:
        """Removes files; those that are not there are fine."""
        await asyncio.to_thread(self._remove, list(file_ids))

    async def purge(self, now_s: float | None = None) -> int:
        """Removes what has outlived its time; how many files that were."""
        now = time.time() if now_s is None else now_s
        with self._lock:
            old = [file_id for file_id in self._sizes if kept_until_s(file_id) <= now]
        await self.remove(old)
        return len(old)

    def link(self, file_id: str, lifetime_s: float) -> str:
        """Path and query under which a file can be read for a time, but not longer than it is kept."""
        expires = min(int(time.time() + lifetime_s), kept_until_s(file_id))
        return f"/v1/files/{file_id}?expires={expires}&signature={self._signature(file_id, expires)}"

    def check(self, file_id: str, expires: int, signature: str) -> None:
        """Raises Refused: 403 for a link that is not from here, 410 for one that has expired."""
        right = self._signature(file_id, expires)
        if not hmac.compare_digest(right.encode(), signature.encode("utf-8", "replace")):
            raise Refused(refusal(403, "invalid_signature", "this link to a picture is not one that the service made"))
        if expires <= time.time():
            raise Refused(refusal(410, "link_expired", "this link to a picture has expired; ask for the picture again"))

    def _signature(self, file_id: str, expires: int) -> str:
        message = f"{file_id}\n{expires}".encode("utf-8", "replace")
        return base64.urlsafe_b64encode(hmac.digest(self._key, message, hashlib.sha256)).decode().rstrip("=")

    def _found(self) -> dict[str, int]:
        """What an earlier process left: its files by age, without what it was writing when it died."""
        found: list[tuple[int, str, int]] = []
        for path in self.folder.iterdir():
            if ID.fullmatch(path.name):
                facts = path.stat()
                found.append((facts.st_mtime_ns, path.name, facts.st_size))
            elif path.name.startswith(".file_"):
                path.unlink(missing_ok=True)
        return {name: size for _, name, size in sorted(found)}

    def _put(self, data: bytes, extension: str, keep_s: float) -> str:
        if len(data) > self.cap_bytes:
            raise InvalidRequest(
                f"a picture of this size has {len(data)} bytes; allowed here: at most {self.cap_bytes}, "
                "which is all that the server may keep (setting store_mb)",
                "size",
            )
        file_id = f"file_{int(time.time() + keep_s):08x}_{secrets.token_urlsafe(16)}.{extension}"
        assert ID.fullmatch(file_id), file_id
        with self._lock:
            self._sizes[file_id] = len(data)
            oldest = self._surplus()
        self._remove(oldest)
        try:
            write_atomically(self.folder / file_id, data)
            _sync(self.folder)
        except OutputError:
            self._remove([file_id])
            raise
        with self._lock:
            dropped = file_id not in self._sizes
        if dropped:  # newer ones needed its place while it was written
            self._remove([file_id])
        return file_id

    def _surplus(self) -> list[str]:
        """The oldest files, without which the rest is within the cap. The newest is never one of them."""
        surplus = sum(self._sizes.values()) - self.cap_bytes
        oldest: list[str] = []
        for file_id, size in self._sizes.items():
            if surplus <= 0:
                break
            oldest.append(file_id)
            surplus -= size
        return oldest

    def _get(self, file_id: str) -> bytes | None:
        if not ID.fullmatch(file_id):
            return None
        try:
            return (self.folder / file_id).read_bytes()
        except FileNotFoundError:
            return None

    def _remove(self, file_ids: list[str]) -> None:
        for file_id in file_ids:
            assert ID.fullmatch(file_id), file_id
            try:
                (self.folder / file_id).unlink(missing_ok=True)
            except OSError as error:
                log.warning("cannot remove the picture %s: %s", file_id, error.strerror)
                continue
            with self._lock:
                self._sizes.pop(file_id, None)


def kept_until_s(file_id: str) -> int:
    """The Unix second in an id."""
    found = ID.fullmatch(file_id)
    assert found, file_id
    return int(found[1], 16)


def media_type(file_id: str) -> str:
    """`image/png` for an id that ends in `.png`."""
    return f"image/{file_id.rpartition('.')[2]}"


def _sync(folder: Path) -> None:
    """Puts a new name on the disk, too; a file system that cannot do that has nothing to be told."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _key(path: Path) -> bytes:
    """The secret that signs links: made once, readable by its owner only."""
    try:
        if path.exists() and len(key := path.read_bytes()) == KEY_BYTES:
            return key
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        with os.fdopen(handle, "wb") as file:
            file.write(key := secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return key
