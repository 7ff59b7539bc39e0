"""Files and folders that are either whole or absent: write beside, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tdm_serve.errors import OutputError


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`. A crash or a full disk leaves the old file, or none; never half of one."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder to fill, which becomes `path` when the block ends well. `path` must not exist, or be an empty folder."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path} exists and is not an empty folder; name a new one")
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield staging
        _open_to_readers(staging)
        staging.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Usual permissions: temporary folders, and what safetensors writes, are readable by their owner only."""
    mask = _umask()
    for path in (folder, *(path for path in folder.rglob("*") if not path.is_symlink())):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_appendable(path: Path) -> None:
    """Raises OutputError unless a line could be appended to `path` now. Leaves nothing behind."""
    existed = path.exists()
    append_line(path, "")
    if not existed:
        path.unlink()


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, which is made if it is not there; an empty line adds nothing."""
    try:
        with path.open("a") as file:
            file.write(line and line + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    value = os.umask(0o022)
    os.umask(value)
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
