"""Recipes of pictures that were handed out, so that they can be rated. No pixels: a recipe makes its picture again."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Picture:
    """A row. `recipe` has what GeneratedImage.recipe() has; `owner` is the id of the key that asked, or empty."""

    image_id: str
    owner: str
    created_s: float
    recipe: dict[str, Any]


def remember(connection: sqlite3.Connection, recipes: Mapping[str, Mapping[str, Any]], owner: str) -> None:
    """Keeps recipes by image id; the same again changes nothing."""
    now = time.time()
    connection.executemany(
        "INSERT INTO pictures (image_id, owner, created_s, recipe) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [(image_id, owner, now, json.dumps(dict(recipe))) for image_id, recipe in recipes.items()],
    )


def get(connection: sqlite3.Connection, image_id: str, owner: str | None = None) -> Picture | None:
    """A picture by its id; None where it is not there or not of `owner`. An owner of None may see all."""
    row = connection.execute("SELECT * FROM pictures WHERE image_id = ?", (image_id,)).fetchone()
    if row is None or owner not in {None, row["owner"]}:
        return None
    return Picture(row["image_id"], row["owner"], row["created_s"], json.loads(row["recipe"]))


def purge(connection: sqlite3.Connection, before_s: float) -> int:
    """Forgets pictures that are older than a time; how many they were."""
    return connection.execute("DELETE FROM pictures WHERE created_s < ?", (before_s,)).rowcount
