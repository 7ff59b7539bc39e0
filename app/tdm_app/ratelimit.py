"""How much one caller may ask for: buckets that fill at a steady rate and hold a minute's worth.

Requests are counted before a route runs; pictures by whoever has read the body, with `pictures`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from tdm_app.auth import Caller
from tdm_app.errors import Problem, retry_headers
from tdm_app.refusal import Refused, refusal
from tdm_app.settings import Settings

MINUTE_S = 60.0
MANY = 10_000  # buckets; full ones are forgotten beyond that, which changes nothing
PAGE = "/gradio_api/queue/join"  # where the page asks for pictures


@dataclass(slots=True)
class _Bucket:
    level: float
    at_s: float


class Buckets:
    """One bucket per caller, of `per_minute` units."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, who: str, units: int = 1) -> float:
        """Takes `units` and returns 0, or takes nothing and returns the seconds until there are enough."""
        now = self._clock()
        bucket = self._buckets.get(who) or self._new(who, now)
        bucket.level = self._level(bucket, now)
        bucket.at_s = now
        if bucket.level >= units:
            bucket.level -= units
            return 0.0
        return (units - bucket.level) * MINUTE_S / self.per_minute

    def _new(self, who: str, now: float) -> _Bucket:
        if len(self._buckets) >= MANY:
            kept = {
                name: bucket for name, bucket in self._buckets.items() if self._level(bucket, now) < self.per_minute
            }
            self._buckets = kept
        return self._buckets.setdefault(who, _Bucket(self.per_minute, now))

    def _level(self, bucket: _Bucket, now: float) -> float:
        return min(self.per_minute, bucket.level + (now - bucket.at_s) * self.per_minute / MINUTE_S)


class Limiter:
    """Both limits of the settings, each of which may be off."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        requests, pictures = settings.requests_per_minute, settings.pictures_per_minute
        self._requests = Buckets(requests, clock) if requests else None
        self._pictures = Buckets(pictures, clock) if pictures else None

    def request(self, caller: Caller) -> Problem | None:
        """Counts a request; the 429 for one too many."""
        wait_s = self._requests.take(caller.share) if self._requests else 0.0
        return _too_many(f"{self._requests.per_minute} requests", wait_s) if self._requests and wait_s else None

    def pictures(self, caller: Caller, count: int) -> None:
        """Counts pictures; raises Refused with 429 for too many now, and with 400 for more than ever."""
        buckets = self._pictures
        if buckets is None:
            return
        if count > buckets.per_minute:
            sentence = f"n is {count}; allowed: at most {buckets.per_minute}, as pictures are limited to that a minute"
            raise Refused(refusal(400, "invalid_value", sentence, param="n"))
        if wait_s := buckets.take(caller.share, count):
            raise Refused(_too_many(f"{buckets.per_minute} pictures", wait_s))


class RateLimit:
    """ASGI middleware inside of Authenticate: counts everything that changes something, and lets reads pass."""

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self.app = app
        self.limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and _is_counted(scope["path"]):
            problem = self.limiter.request(scope["state"]["caller"])
            if problem is not None:
                return await problem.response()(scope, receive, send)
        return await self.app(scope, receive, send)


def _is_counted(path: str) -> bool:
    return path.startswith(("/v1/", PAGE))


def _too_many(what: str, wait_s: float) -> Problem:
    sentence = f"the limit is {what} a minute; the next fits in {wait_s:.1f} s"
    return refusal(429, "rate_limit_exceeded", sentence, headers=retry_headers(wait_s * 1000))
