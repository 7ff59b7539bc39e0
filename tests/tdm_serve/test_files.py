"""Files and folders are whole or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tdm_serve.errors import OutputError
from tdm_serve.files import append_line, check_appendable, new_folder, sha256, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data in (b"first", b"second, longer", b""):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.bin", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*No such file or directory"):
        write_atomically(tmp_path / "missing" / "a.bin", b"x")


def test_target_that_is_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_atomically(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write itself fails, half-way."""
    import resource
    import signal

    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc" * 100_000)
    assert sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "below" / "new"
    before = os.umask(0o027)
    try:
        with new_folder(target) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "a").touch(0o600)
            assert not target.exists()
    finally:
        os.umask(before)
    assert [path.name for path in target.parent.iterdir()] == ["new"]
    assert [p.stat().st_mode & 0o777 for p in (target, target / "inner", target / "inner" / "a")] == [
        0o750, 0o750, 0o640,
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("no"), RuntimeError), (OSError(28, "full"), OutputError)])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: Exception, raised: type[Exception]) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "a").touch()
            raise error

    with pytest.raises(raised):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    for path in (tmp_path / "empty", tmp_path / "empty" / "a"):
        with pytest.raises(OutputError, match="not an empty folder"), new_folder(path):
            raise AssertionError
    with pytest.raises(OutputError, match="cannot write"), new_folder(tmp_path / "empty" / "a" / "below"):
        raise AssertionError
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "a"]


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    check_appendable(path)
    assert not path.exists()
    append_line(path, "one")
    check_appendable(path)
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


@pytest.mark.parametrize("name", [".", "missing/rows.jsonl", "file/rows.jsonl"])
def test_a_path_that_takes_no_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        check_appendable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
