"""The one SQLite file: how it is opened, how its schema grows, and how its failures are told.

WAL mode, so that readers never wait for the writer and a process that is killed leaves a whole database. A commit is
handed to the operating system, which is enough to survive kill -9; a durable one is also on the disk, which is enough
to survive a power cut.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator
from pathlib import Path

from tdm_serve.errors import ConfigError, OutputError

OLDEST = (3, 37, 0)  # SQLite with STRICT tables
BUSY_S = 10.0  # `tdm-serve keys` and a server may write at the same time; each waits this long for the other

# Writes the log back into the database and empties it, so that what was deleted is in neither.
EMPTY_LOG = "PRAGMA wal_checkpoint(TRUNCATE)"

# One script per version; a database of version N has had the first N. Never change one that was released.
MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        number INTEGER NOT NULL UNIQUE,  -- order of acceptance
        owner TEXT NOT NULL,
        body TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
        attempts INTEGER NOT NULL DEFAULT 0,
        created_s REAL NOT NULL,
        started_s REAL,
        finished_s REAL,
        eta_ms REAL,
        error TEXT,
        result TEXT,
        files TEXT NOT NULL DEFAULT '[]'
    ) STRICT;
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE INDEX jobs_by_owner ON jobs (owner, number);
    CREATE TABLE pictures (
        image_id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        created_s REAL NOT NULL,
        recipe TEXT NOT NULL
    ) STRICT;
    CREATE INDEX pictures_by_age ON pictures (created_s);
    CREATE TABLE feedback (
        id TEXT NOT NULL,
        image_id TEXT NOT NULL,
        owner TEXT NOT NULL,
        rating REAL NOT NULL CHECK (rating BETWEEN -1 AND 1),
        created_s REAL NOT NULL,
        recipe TEXT NOT NULL,
        PRIMARY KEY (id, image_id),
        UNIQUE (owner, image_id)
    ) STRICT;
    CREATE INDEX feedback_by_age ON feedback (created_s);
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        scope TEXT NOT NULL CHECK (scope IN ('user', 'admin')),
        secret_sha256 BLOB NOT NULL,
        created_s REAL NOT NULL,
        revoked_s REAL
    ) STRICT;
    """,
    """
    CREATE TABLE trainings (
        id TEXT PRIMARY KEY,
        number INTEGER NOT NULL UNIQUE,
        model TEXT NOT NULL,  -- that was trained further
        version TEXT NOT NULL UNIQUE,  -- that comes of it
        status TEXT NOT NULL CHECK (status IN ('running', 'succeeded', 'failed', 'cancelled', 'interrupted')),
        ratings INTEGER NOT NULL,
        groups INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 1,
        created_s REAL NOT NULL,
        finished_s REAL,
        error TEXT,
        loaded INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
)


def connect(path: Path) -> sqlite3.Connection:
    """The database at `path`, made or brought up to date if need be. Readable by its owner only.

    The connection may be handed to another thread but not be used by two at once. ConfigError for what is no database
    of ours, OutputError where it cannot be written.
    """
    if sqlite3.sqlite_version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ConfigError(f"Python's SQLite is {sqlite3.sqlite_version}; the service's state needs {wanted} or newer")
    with sentences(path):
        try:
            path.touch(mode=0o600)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA secure_delete = ON")  # what somebody had deleted is gone from the file
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Runs the scripts that the database has not had, all or none; two processes may come here at once."""
    if _version(connection) == len(MIGRATIONS):
        return
    with transaction(connection, durable=True):
        version = _version(connection)
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"{path} was written by a newer tdm-serve (schema {version}); allowed: up to {len(MIGRATIONS)}"
            )
        for script in MIGRATIONS[version:]:
            for statement in _statements(script):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> list[str]:
    """The statements one by one: sqlite3's own executescript would commit in between."""
    return [statement for statement in script.split(";\n") if statement.strip()]


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, durable: bool = False) -> Generator[None]:
    """All or nothing, written when the block ends well; `durable` waits for the disk."""
    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def sentences(path: Path) -> Generator[None]:
    """Turns SQLite's failures that the machine causes into ours; those that a bug causes stay as they are."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except sqlite3.OperationalError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path} is no database of tdm-serve: {error}; move it away to begin anew") from error
