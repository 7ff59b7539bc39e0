"""One server per state folder: two would run the same jobs twice and delete each other's pictures."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tdm_serve.errors import ConfigError, OutputError


class FolderLock:
    """Held until `release` or the end of the process, however it ends: the system lets it go then."""

    def __init__(self, folder: Path) -> None:
        """ConfigError where another process has it, OutputError where the folder cannot be written."""
        path = folder / "lock"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._file, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            raise ConfigError(
                f"{folder} is in use by another server (process {holder}); give each its own --state-dir"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode("ascii"), 0)

    def release(self) -> None:
        os.close(self._file)
