"""Which job goes next, and how many pictures come before one. Decisions only: no clock, no engine, no disk."""

from __future__ import annotations

from collections.abc import Iterable

from tdm_app.live_job import LiveJob


class JobQueue:
    """The jobs that have not ended. Those without a ticket wait; the engine has the others."""

    def __init__(self) -> None:
        self._live: dict[str, LiveJob] = {}
        self._served: dict[str, int] = {}  # pictures by tenant, for fair turns

    def __len__(self) -> int:
        return len(self._live)

    def add(self, live: LiveJob) -> None:
        self._live[live.id] = live

    def drop(self, job_id: str) -> LiveJob | None:
        """Takes a job out. A tenant without jobs is forgotten: clients may make up as many as they like."""
        live = self._live.pop(job_id, None)
        if live is not None and not any(other.tenant == live.tenant for other in self._live.values()):
            self._served.pop(live.tenant, None)
        return live

    def get(self, job_id: str) -> LiveJob | None:
        return self._live.get(job_id)

    @property
    def all(self) -> list[LiveJob]:
        return list(self._live.values())

    @property
    def waiting(self) -> list[LiveJob]:
        return [live for live in self._live.values() if live.ticket is None]

    @property
    def fed(self) -> int:
        """Pictures of jobs that the engine has."""
        return sum(live.pictures for live in self._live.values() if live.ticket is not None)

    def next(self) -> LiveJob | None:
        """By priority; among equals who has had least so far; then by deadline and age."""
        ready = (live for live in self.waiting if live.accepted)
        return min(ready, key=lambda live: (live.rank[0], self._had(live), *live.rank[1:]), default=None)

    def before(self, live: LiveJob) -> Iterable[LiveJob]:
        """The waiting jobs that rank before one."""
        return (other for other in self.waiting if other.rank < live.rank)

    def serve(self, live: LiveJob) -> None:
        """Notes that a job had its turn. Who comes anew starts level with the others: with no claim on the past."""
        level = min((self._had(other) for other in self.waiting), default=0)
        self._served[live.tenant] = max(self._had(live), level) + live.pictures

    def _had(self, live: LiveJob) -> int:
        return self._served.get(live.tenant, 0)
