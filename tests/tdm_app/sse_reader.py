"""Reading a stream of server-sent events, as strictly as the standard is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One event, with its data as JSON."""

    name: str
    data: Any
    id: str = ""


def parse(text: str) -> tuple[list[Event], int]:
    """All events of a finished stream, and how many comments there were. Every event has to be complete."""
    assert text.endswith("\n\n")
    events, comments = [], 0
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            comments += 1
            assert "\n" not in block
            continue
        events.append(_event(block))
    return events, comments


def read(lines: Iterable[str]) -> Iterator[Event]:
    """Events of a stream that is still open, from its lines."""
    block: list[str] = []
    for line in lines:
        if line and not line.startswith(":"):
            block.append(line)
        elif not line and block:
            yield _event("\n".join(block))
            block = []


def _event(block: str) -> Event:
    fields = dict(line.split(": ", 1) for line in block.split("\n"))
    assert set(fields) <= {"event", "data", "id"}, block[:200]
    return Event(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id", ""))
