"""A folder that is filled part by part, survives an interruption, and gets its name only when it is whole.

Parts are written into a hidden folder beside the final one, with a journal of those that are done. The same export,
started again, goes on behind the last of them; another export, or other packages, starts afresh. When the export fails
by itself, as on a full disk, the hidden folder goes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdm_serve.artifact import FileFact, fact_of
from tdm_serve.errors import OutputError
from tdm_serve.files import sha256, write_atomically

JOURNAL = "journal.json"


class Staging:
    """The hidden folder of one export."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        """`fingerprint` is everything that decides what the parts hold. Raises OutputError."""
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._done: dict[str, list[FileFact]] = {}
        self._take_up()

    def _take_up(self) -> None:
        """Goes on where an interrupted export of the same kind stopped, or begins with an empty folder."""
        journal = self.folder / JOURNAL
        try:
            found: Any = json.loads(journal.read_text()) if journal.is_file() else {}
        except ValueError:
            found = {}
        if found.get("fingerprint") == self._fingerprint:
            kept = {name: [FileFact(**fact) for fact in facts] for name, facts in found["done"].items()}
            self._done = {name: facts for name, facts in kept.items() if all(map(self._whole, facts))}
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _whole(self, fact: FileFact) -> bool:
        path = self.folder / fact.name
        return path.is_file() and path.stat().st_size == fact.bytes and sha256(path) == fact.sha256

    @property
    def done(self) -> Mapping[str, Sequence[FileFact]]:
        """The parts that are there, whole."""
        return self._done

    def part(self, name: str, make: Callable[[Path], Sequence[Path]]) -> tuple[FileFact, ...]:
        """The files of a part, the one to open first: made by `make(folder)`, unless they are there already."""
        if name not in self._done:
            files = make(self.folder)
            for path in files:
                _flush(path)
            self._done[name] = [fact_of(path) for path in files]
            done = {part: [_as_dict(fact) for fact in facts] for part, facts in self._done.items()}
            document = json.dumps({"fingerprint": self._fingerprint, "done": done})
            write_atomically(self.folder / JOURNAL, document.encode())
        return tuple(self._done[name])

    def publish(self) -> None:
        """Gives the folder its final name, with everything in it on the disk."""
        (self.folder / JOURNAL).unlink()
        known = {fact.name for facts in self._done.values() for fact in facts}
        for path in self.folder.iterdir():
            if path.suffix != ".json" and path.name not in known:
                path.unlink()  # of a part that an interruption cut off
        _flush(self.folder)
        self.folder.replace(self.output)
        _flush(self.output.parent)

    def drop(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def staging(output: Path, fingerprint: Mapping[str, Any]) -> Generator[Staging]:
    """A staging folder that survives an interruption (an exception that is no Exception) and no failure."""
    try:
        stage = Staging(output, fingerprint)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    try:
        yield stage
    except OSError as error:
        stage.drop()
        raise OutputError(f"cannot write {output}: {error.strerror or error}; nothing was kept") from error
    except Exception:
        stage.drop()
        raise


def _as_dict(fact: FileFact) -> dict[str, Any]:
    return {"name": fact.name, "bytes": fact.bytes, "sha256": fact.sha256}


def _flush(path: Path) -> None:
    """What the system holds of a file or folder goes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
