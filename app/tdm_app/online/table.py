"""Trainings in the database. Functions of a connection; `State` runs them in its threads.

A training is running until it is one of succeeded, failed, cancelled and interrupted, which it stays. One that was
running when the service stopped is found running at the next start, and goes on from its last saved state.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Any, Literal

from tdm_app.job_table import new_id

Status = Literal["running", "succeeded", "failed", "cancelled", "interrupted"]
STATUSES: tuple[Status, ...] = ("running", "succeeded", "failed", "cancelled", "interrupted")


@dataclass(frozen=True, slots=True)
class Training:
    """A row. `version` is what comes of training `model` further; times are Unix seconds.

    `ratings` and `groups` are what it was started with, `error` a sentence, `attempts` how often its process began.
    """

    id: str
    number: int
    model: str
    version: str
    status: Status
    ratings: int
    groups: int
    attempts: int
    created_s: float
    finished_s: float | None
    error: str | None
    loaded: bool


def add(connection: sqlite3.Connection, model: str, root: str, ratings: int, groups: int) -> Training:
    """A new one, running; the version is called after its root and its number, which are never used again."""
    number = connection.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM trainings").fetchone()[0]
    training_id = new_id("train")
    connection.execute(
        "INSERT INTO trainings (id, number, model, version, status, ratings, groups, created_s) "
        "VALUES (?, ?, ?, ?, 'running', ?, ?, ?)",
        (training_id, number, model, f"{root}-online-{number}", ratings, groups, time.time()),
    )
    found = get(connection, training_id)
    assert found is not None
    return found


def get(connection: sqlite3.Connection, training_id: str) -> Training | None:
    """One by its id."""
    row = connection.execute("SELECT * FROM trainings WHERE id = ?", (training_id,)).fetchone()
    return None if row is None else _training(row)


def newest(connection: sqlite3.Connection, limit: int = 100) -> list[Training]:
    """The newest first."""
    rows = connection.execute("SELECT * FROM trainings ORDER BY number DESC LIMIT ?", (limit,))
    return [_training(row) for row in rows]


def of_version(connection: sqlite3.Connection, version: str) -> Training | None:
    """The one that a version came from; None for a version that was not trained here."""
    row = connection.execute("SELECT * FROM trainings WHERE version = ?", (version,)).fetchone()
    return None if row is None else _training(row)


def again(connection: sqlite3.Connection, training_id: str) -> None:
    """Its process begins once more."""
    connection.execute("UPDATE trainings SET attempts = attempts + 1 WHERE id = ?", (training_id,))


def end(connection: sqlite3.Connection, training_id: str, status: Status, error: str | None = None) -> bool:
    """running -> `status`. False where it has ended already."""
    cursor = connection.execute(
        "UPDATE trainings SET status = ?, error = ?, finished_s = ? WHERE id = ? AND status = 'running'",
        (status, error, time.time(), training_id),
    )
    return cursor.rowcount == 1


def set_loaded(connection: sqlite3.Connection, training_id: str, loaded: bool) -> None:
    """Whether its version is served, also after a restart."""
    connection.execute("UPDATE trainings SET loaded = ? WHERE id = ?", (loaded, training_id))


def _training(row: sqlite3.Row) -> Training:
    values: dict[str, Any] = dict(zip(row.keys(), row, strict=True))
    values["loaded"] = bool(values["loaded"])
    return Training(**values)
