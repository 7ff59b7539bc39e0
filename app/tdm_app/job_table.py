"""Jobs in the database. Functions of a connection; `State` runs them in its threads.

A job is queued, running, and then one of succeeded, failed and cancelled, which it stays: every change says from which
states it may come, and tells whether it happened. So a job that is cancelled in its last moment has one end, not two.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tdm_app import picture_table
from tdm_serve.errors import InvalidRequest

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Json = dict[str, Any]

MAX_ATTEMPTS = 3  # a job that the service did not survive this often is not tried again
LOST: Json = {
    "message": f"the service stopped {MAX_ATTEMPTS} times while this job ran, so it is not tried again",
    "type": "server_error",
    "param": None,
    "code": "job_lost",
}


@dataclass(frozen=True, slots=True)
class Job:
    """A row. `owner` is the id of the key that asked, empty without keys; `body` is the request with its seeds.

    Times are Unix seconds. `eta_ms` is what was promised at acceptance, `error` the inside of an error body, `result`
    what the client gets, `files` the ids of its pictures in the store.
    """

    id: str
    owner: str
    body: Json
    status: Status = "queued"
    attempts: int = 0
    created_s: float = 0.0
    started_s: float | None = None
    finished_s: float | None = None
    eta_ms: float | None = None
    error: Json | None = None
    result: Json | None = None
    files: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.status not in {"queued", "running"}


def new_id(prefix: str) -> str:
    """An id that nobody can guess: 128 random bits after the prefix."""
    return f"{prefix}_{secrets.token_urlsafe(16)}"


def add(connection: sqlite3.Connection, owner: str, body: Json, eta_ms: float | None, job_id: str) -> Job:
    """Accepts a job. IntegrityError for an id that is there."""
    job = Job(job_id, owner, body, created_s=time.time(), eta_ms=eta_ms)
    connection.execute(
        "INSERT INTO jobs (id, number, owner, body, status, created_s, eta_ms) "
        "VALUES (?, (SELECT COALESCE(MAX(number), 0) + 1 FROM jobs), ?, ?, 'queued', ?, ?)",
        (job.id, owner, json.dumps(body), job.created_s, eta_ms),
    )
    return job


def get(connection: sqlite3.Connection, job_id: str, owner: str | None = None) -> Job | None:
    """A job by its id; None where it is not there or not of `owner`. An owner of None may see all."""
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None or owner not in {None, row["owner"]} else _job(row)


def of(connection: sqlite3.Connection, owner: str | None, limit: int, after: str | None = None) -> list[Job]:
    """The newest jobs of an owner, newest first; of those below `after`, so that new ones move nothing on a later page.

    InvalidRequest where `after` is no job of the owner's.
    """
    below = None if after is None else _number(connection, after, owner)
    rows = connection.execute(
        "SELECT * FROM jobs WHERE (?1 IS NULL OR owner = ?1) AND (?3 IS NULL OR number < ?3) "
        "ORDER BY number DESC LIMIT ?2",
        (owner, limit, below),
    )
    return [_job(row) for row in rows]


def _number(connection: sqlite3.Connection, job_id: str, owner: str | None) -> int:
    found = "SELECT number FROM jobs WHERE id = ?1 AND (?2 IS NULL OR owner = ?2)"
    row = connection.execute(found, (job_id, owner)).fetchone()
    if row is None:
        raise InvalidRequest(f"after is {job_id!r}, which is no job of yours or was forgotten; begin anew", "after")
    return row["number"]


def start(connection: sqlite3.Connection, job_id: str) -> bool:
    """queued -> running. False for a job that is not queued, such as one that was cancelled meanwhile."""
    return _change(
        connection,
        "UPDATE jobs SET status = 'running', attempts = attempts + 1, started_s = ? WHERE id = ? AND status = 'queued'",
        (time.time(), job_id),
    )


def finish(
    connection: sqlite3.Connection,
    job_id: str,
    result: Json,
    files: Sequence[str],
    pictures: Mapping[str, Json],
) -> bool:
    """-> succeeded, with its result and the recipes of its pictures (image id -> recipe) in one go.

    False for a job that has ended already; nothing is written then, and the caller removes `files`. True also where
    these very files are its result: a commit may succeed and still be told as failed.
    """
    done = _change(
        connection,
        "UPDATE jobs SET status = 'succeeded', finished_s = ?, result = ?, files = ? "
        "WHERE id = ? AND status IN ('queued', 'running')",
        (time.time(), json.dumps(result), json.dumps(list(files)), job_id),
    )
    job = get(connection, job_id)
    if job is not None and done:
        picture_table.remember(connection, pictures, job.owner)
    return job is not None and (done or (bool(files) and job.files == tuple(files)))


def fail(connection: sqlite3.Connection, job_id: str, error: Json) -> bool:
    """-> failed. False for a job that has ended already."""
    return _change(
        connection,
        "UPDATE jobs SET status = 'failed', finished_s = ?, error = ? WHERE id = ? AND status IN ('queued', 'running')",
        (time.time(), json.dumps(error), job_id),
    )


def cancel(connection: sqlite3.Connection, job_id: str) -> bool:
    """-> cancelled. False for a job that has ended already."""
    return _change(
        connection,
        "UPDATE jobs SET status = 'cancelled', finished_s = ? WHERE id = ? AND status IN ('queued', 'running')",
        (time.time(), job_id),
    )


def to_run(connection: sqlite3.Connection) -> list[Job]:
    """At start: every job that has not ended, in the order of acceptance, all queued again.

    What ran when the process died is run again from its recipe, unless it was part of every death.
    """
    connection.execute(
        "UPDATE jobs SET status = 'failed', finished_s = ?, error = ? WHERE status = 'running' AND attempts >= ?",
        (time.time(), json.dumps(LOST), MAX_ATTEMPTS),
    )
    connection.execute("UPDATE jobs SET status = 'queued', started_s = NULL WHERE status = 'running'")
    return [_job(row) for row in connection.execute("SELECT * FROM jobs WHERE status = 'queued' ORDER BY number")]


def purge(connection: sqlite3.Connection, before_s: float) -> list[str]:
    """Forgets jobs that ended before a time. Returns the files that nobody needs any more."""
    rows = connection.execute("DELETE FROM jobs WHERE finished_s < ? RETURNING files", (before_s,)).fetchall()
    return [file for row in rows for file in json.loads(row["files"])]


def _change(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> bool:
    return connection.execute(statement, values).rowcount == 1


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        owner=row["owner"],
        body=json.loads(row["body"]),
        status=row["status"],
        attempts=row["attempts"],
        created_s=row["created_s"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        eta_ms=row["eta_ms"],
        error=json.loads(row["error"]) if row["error"] else None,
        result=json.loads(row["result"]) if row["result"] else None,
        files=tuple(json.loads(row["files"])),
    )
