"""Start-time fair queueing: tenants that wait share the device by weight, however many pictures each has queued.

Every picture gets a tag, the virtual time at which it would begin if its tenant got its share and no more: where the
tenant's picture before it ends, but not before what is being served now. Smaller tags go first, so the first picture
of a tenant who asks for little passes the backlog of one who asks for much. Priority moves a picture ahead by so many
ms of service for each level: a head start rather than a class of its own, so that what is low comes up with time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tdm_serve.scheduler.nouns import Policy, Work
from tdm_serve.scheduler.plan import Picture

GREEDY = 4  # pictures that a tenant has queued beyond its share, and beyond what all others have, before it gives way
FORGET_ABOVE = 1024  # tenants remembered before those that have nothing to make up for are dropped


class Shares:
    """Who has had how much."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._clock = 0.0  # tag of what began last
        self._served: dict[str, float] = {}  # where the tenant's share that began ends

    def tag(self, pictures: Sequence[Picture], waiting: Iterable[Picture]) -> None:
        """Gives a ticket's pictures their tags and keys. What its tenant queued at a lower priority does not count."""
        work = pictures[0].work
        waiting = list(waiting)
        now = min((picture.tag for picture in waiting), default=self._clock)
        mine = [picture for picture in waiting if picture.work.tenant == work.tenant]
        ahead = [self._end(picture) for picture in mine if picture.work.priority >= work.priority]
        tag = max([now, self._served.get(work.tenant, now), *ahead])
        for picture in pictures:
            picture.tag = tag
            picture.key = tag - work.priority * self._policy.aging_ms
            tag = self._end(picture)

    def began(self, picture: Picture) -> None:
        """A picture was taken out of the queue to run."""
        tenant = picture.work.tenant
        self._clock = max(self._clock, picture.tag)
        self._served[tenant] = max(self._served.get(tenant, 0.0), self._end(picture))
        if len(self._served) > FORGET_ABOVE:
            self._served = {name: end for name, end in self._served.items() if end > self._clock}

    def limits(self, waiting: Sequence[Picture], work: Work) -> list[float]:
        """How late each of `waiting` may get for the sake of `work`: its due moment, and what is owed beyond.

        A lower priority gives way by `aging_ms` for each level between the two. A tenant that has by far the most of
        the queue gives way by one picture, and by `fair_share` of what it has ahead of each beyond its share.
        Deadlines give no way.
        """
        policy = self._policy
        greedy = self._greedy(waiting, work)
        ahead_of_all, ahead = 0.0, dict.fromkeys(greedy, 0.0)
        limits: list[float] = []
        for picture in waiting:
            other = picture.work
            limit = picture.due_ms
            if other.deadline_ms is None:
                limit += policy.aging_ms * max(0, work.priority - other.priority)
                if other.tenant in greedy:
                    beyond_ms = ahead[other.tenant] - ahead_of_all * greedy[other.tenant]
                    limit += policy.fair_share * max(0.0, beyond_ms) + picture.share_ms
            ahead_of_all += picture.share_ms
            if other.tenant in ahead:
                ahead[other.tenant] += picture.share_ms
            limits.append(limit)
        return limits

    def _greedy(self, waiting: Sequence[Picture], work: Work) -> dict[str, float]:
        """Tenants other than that of `work` with more beyond their share than all others have at all; their shares."""
        queued = {work.tenant: 0.0}
        for picture in waiting:
            queued[picture.work.tenant] = queued.get(picture.work.tenant, 0.0) + picture.share_ms
        everything, weights = sum(queued.values()), sum(self._weight(tenant) for tenant in queued)
        shares = {tenant: self._weight(tenant) / weights for tenant in queued if tenant != work.tenant}
        few_ms = GREEDY * max([picture.share_ms for picture in waiting], default=0.0)
        return {
            tenant: share
            for tenant, share in shares.items()
            if queued[tenant] - share * everything > max(few_ms, everything - queued[tenant])
        }

    def _end(self, picture: Picture) -> float:
        return picture.tag + picture.share_ms / self._weight(picture.work.tenant)

    def _weight(self, tenant: str) -> float:
        return self._policy.weights.get(tenant, 1.0)
