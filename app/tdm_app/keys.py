"""API keys: `tdm_ID_SECRET`. The id finds the row and is no secret; the secret is shown once and kept as a hash only.

SHA-256 without salt or stretching is enough here: those protect secrets that people choose. Ours are 256 random bits,
so neither a table nor a guess finds one from its hash, and a check costs microseconds.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from typing import Literal

from tdm_serve.errors import InvalidRequest

Scope = Literal["user", "admin"]
SCOPES = ("user", "admin")
FORM = re.compile(r"tdm_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it may be shown: everything but the secret. Times are Unix seconds."""

    id: str
    name: str
    scope: Scope
    created_s: float
    revoked_s: float | None = None


def create(connection: sqlite3.Connection, name: str, scope: Scope) -> tuple[Key, str]:
    """A new key and its text, which cannot be had again."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"the key's name is {name!r}; allowed: 1 to {MAX_NAME} printable characters", "name")
    key, secret = Key(secrets.token_hex(6), name, scope, time.time()), secrets.token_urlsafe(32)
    connection.execute(
        "INSERT INTO keys (id, name, scope, secret_sha256, created_s) VALUES (?, ?, ?, ?, ?)",
        (key.id, name, scope, _hash(secret), key.created_s),
    )
    return key, f"tdm_{key.id}_{secret}"


def listed(connection: sqlite3.Connection) -> list[Key]:
    """All keys, the oldest first; revoked ones too, since jobs and feedback may name them."""
    return [_key(row) for row in connection.execute("SELECT * FROM keys ORDER BY created_s, id")]


def revoke(connection: sqlite3.Connection, key_id: str) -> bool:
    """From now on the key opens nothing. False where there is no such key, or it was revoked before."""
    cursor = connection.execute(
        "UPDATE keys SET revoked_s = ? WHERE id = ? AND revoked_s IS NULL", (time.time(), key_id)
    )
    return cursor.rowcount == 1


def verify(connection: sqlite3.Connection, text: str) -> Key | None:
    """The key that a text is, or None. The secret is compared in constant time, also where the id is unknown."""
    form = FORM.fullmatch(text)
    if form is None:
        return None
    row = connection.execute("SELECT * FROM keys WHERE id = ? AND revoked_s IS NULL", (form[1],)).fetchone()
    right = hmac.compare_digest(_hash(form[2]), row["secret_sha256"] if row else bytes(32))
    return _key(row) if row and right else None


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key(row: sqlite3.Row) -> Key:
    return Key(row["id"], row["name"], row["scope"], row["created_s"], row["revoked_s"])
