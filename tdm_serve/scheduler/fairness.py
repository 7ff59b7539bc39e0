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

        A lower priority gives way by `aging_ms` for each level between the two; a tenant with more than its share
        ahead of a picture gives way by `fair_share` of the surplus, and one that has by far the most of the queue by
        a picture anyway. Deadlines give no way.
        """
        policy = self._policy
        tenants = {picture.work.tenant for picture in waiting} | {work.tenant}
        total = sum(self._weight(tenant) for tenant in tenants)
        ahead_of_all, ahead = 0.0, dict.fromkeys(tenants, 0.0)
        queued = dict.fromkeys(tenants, 0.0)
        for picture in waiting:
            queued[picture.work.tenant] += picture.share_ms
        everything = sum(queued.values())
        surplus = {tenant: queued[tenant] - everything * self._weight(tenant) / total for tenant in tenants}
        greedy = {tenant for tenant in tenants if surplus[tenant] > everything - queued[tenant]}
        limits: list[float] = []
        for picture in waiting:
            other = picture.work
            limit = picture.due_ms
            if other.deadline_ms is None:
                limit += policy.aging_ms * max(0, work.priority - other.priority)
                if other.tenant != work.tenant:
                    share = ahead_of_all * self._weight(other.tenant) / total
                    limit += policy.fair_share * max(0.0, ahead[other.tenant] - share)
                    if other.tenant in greedy and surplus[other.tenant] > GREEDY * picture.share_ms:
                        limit += picture.share_ms
            ahead_of_all += picture.share_ms
            ahead[other.tenant] += picture.share_ms
            limits.append(limit)
        return limits

    def _end(self, picture: Picture) -> float:
        return picture.tag + picture.share_ms / self._weight(picture.work.tenant)

    def _weight(self, tenant: str) -> float:
        return self._policy.weights.get(tenant, 1.0)
