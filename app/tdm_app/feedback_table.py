"""Ratings in the database: who said what of which picture, with the recipe that makes the picture again.

The last word counts: a person has one rating per picture. Training knows likes and dislikes only, so a preference is
both: the better picture is liked and the other one disliked, under one id.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

LIKE, DISLIKE = 1.0, -1.0
UNUSABLE = ("negative_prompt", "truncated", "adapter_scale")  # what recipes may have, and records have no place for


@dataclass(frozen=True, slots=True)
class Rating:
    """A row. `rating` is LIKE or DISLIKE; two rows share an id where one picture was preferred to another."""

    id: str
    image_id: str
    owner: str
    rating: float
    created_s: float
    recipe: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The rating as the trainer reads it; docs/rewards.md describes the keys."""
        recipe = self.recipe
        time = datetime.fromtimestamp(self.created_s, UTC).isoformat(timespec="seconds")
        return {
            "prompt": recipe["prompt"],
            "seed": recipe["seed"],
            "model": recipe["model"],
            "checkpoint_hash": recipe["checkpoint_hash"],
            "size": f"{recipe['width']}x{recipe['height']}",
            "like": self.rating > 0,
            "time": time.replace("+00:00", "Z"),
            "sigmas": recipe["sigmas"],
            "guidance": recipe["guidance"],
        }

    @property
    def usable(self) -> bool:
        """Whether a record says all that makes the picture."""
        return not any(name in self.recipe for name in UNUSABLE)


def give(
    connection: sqlite3.Connection,
    feedback_id: str,
    owner: str,
    ratings: Mapping[str, float],
    recipes: Mapping[str, Any],
) -> list[Rating]:
    """Stores ratings by image id under one id, in place of what the owner said of these pictures before."""
    now = time.time()
    rows = [Rating(feedback_id, image, owner, rating, now, recipes[image]) for image, rating in ratings.items()]
    connection.executemany(
        "INSERT INTO feedback (id, image_id, owner, rating, created_s, recipe) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (owner, image_id) DO UPDATE SET "
        "id = excluded.id, rating = excluded.rating, created_s = excluded.created_s, recipe = excluded.recipe",
        [(row.id, row.image_id, owner, row.rating, now, json.dumps(row.recipe)) for row in rows],
    )
    return rows


def listed(connection: sqlite3.Connection, limit: int, after: str | None = None) -> tuple[list[Rating], bool]:
    """What was said under `limit` ids, the newest first, from below the id `after` on; and whether there is more."""
    rows = connection.execute(
        "SELECT * FROM feedback WHERE id IN (SELECT DISTINCT id FROM feedback WHERE ?1 IS NULL OR (created_s, id) < "
        "(SELECT created_s, id FROM feedback WHERE id = ?1) ORDER BY created_s DESC, id DESC LIMIT ?2) "
        "ORDER BY created_s DESC, id DESC, image_id",
        (after, limit + 1),
    )
    ratings = [_rating(row) for row in rows]
    ids = list(dict.fromkeys(rating.id for rating in ratings))
    return [rating for rating in ratings if rating.id in ids[:limit]], len(ids) > limit


def everything(connection: sqlite3.Connection) -> Iterator[Rating]:
    """All ratings, the oldest first."""
    return map(_rating, connection.execute("SELECT * FROM feedback ORDER BY created_s, id, image_id"))


def delete(
    connection: sqlite3.Connection,
    *,
    feedback_id: str | None = None,
    image_id: str | None = None,
    owner: str | None = None,
) -> int:
    """Deletes the ratings that fit all that is given; how many. By image or owner, the recipes go as well."""
    if feedback_id is None:
        connection.execute(
            "DELETE FROM pictures WHERE (?1 IS NULL OR image_id = ?1) AND (?2 IS NULL OR owner = ?2)", (image_id, owner)
        )
    cursor = connection.execute(
        "DELETE FROM feedback WHERE (?1 IS NULL OR image_id = ?1) AND (?2 IS NULL OR owner = ?2) "
        "AND (?3 IS NULL OR id = ?3)",
        (image_id, owner, feedback_id),
    )
    return cursor.rowcount


def purge(connection: sqlite3.Connection, before_s: float) -> int:
    """Forgets ratings that are older than a time; how many they were."""
    return connection.execute("DELETE FROM feedback WHERE created_s < ?", (before_s,)).rowcount


def _rating(row: sqlite3.Row) -> Rating:
    return Rating(row["id"], row["image_id"], row["owner"], row["rating"], row["created_s"], json.loads(row["recipe"]))
