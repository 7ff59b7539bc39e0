"""Load for an images server, from a process of its own: closed loop, or open loop at given arrival times.

In a closed loop each of `clients` asks again as soon as it is answered; in an open loop requests go out when they are
due, whatever has become of the earlier ones. Nothing is retried. Times are milliseconds since the start of the load.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

PATH = "/v1/images/generations"
TIMEOUT_S = 120.0
OK, REFUSED = 200, 429


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    sent_ms: float
    done_ms: float
    status: int
    eta_ms: float | None = None  # what the server promised, where it promises
    model_ms: float | None = None  # the time in the model, where the server tells
    retry_after_ms: float | None = None

    @property
    def latency_ms(self) -> float:
        return self.done_ms - self.sent_ms


def closed(url: str, prompts: Iterator[str], *, clients: int, seconds: float) -> list[Outcome]:
    """`clients` at once, each asking again when answered, for `seconds`. What is under way then is finished."""

    async def run(ask: Ask, now_ms: Clock) -> list[Outcome]:
        async def client() -> list[Outcome]:
            found: list[Outcome] = []
            while now_ms() < seconds * 1000:
                found.append(await ask(next(prompts)))
            return found

        return [outcome for one in await asyncio.gather(*(client() for _ in range(clients))) for outcome in one]

    return asyncio.run(_with_client(url, run))


def opened(url: str, prompts: Iterator[str], arrivals_ms: Sequence[float]) -> list[Outcome]:
    """One request at each arrival time; the outcomes in that order."""

    async def run(ask: Ask, now_ms: Clock) -> list[Outcome]:
        tasks: list[asyncio.Task[Outcome]] = []
        for due in arrivals_ms:
            await asyncio.sleep(max(0.0, (due - now_ms()) / 1000))
            tasks.append(asyncio.create_task(ask(next(prompts))))
        return list(await asyncio.gather(*tasks))

    return asyncio.run(_with_client(url, run))


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process with `rate` a second."""
    rng, now, times = random.Random(seed), 0.0, list[float]()
    while (now := now + rng.expovariate(rate)) < seconds:
        times.append(now * 1000)
    return times


def bursts(size: int, every_s: float, seconds: float) -> list[float]:
    """`size` arrivals at once, every `every_s` seconds."""
    return [start * every_s * 1000 for start in range(int(seconds / every_s)) for _ in range(size)]


Ask = Callable[[str], Coroutine[Any, Any, Outcome]]
Clock = Callable[[], float]


async def _with_client(url: str, run: Callable[[Ask, Clock], Coroutine[Any, Any, list[Outcome]]]) -> list[Outcome]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        started = time.perf_counter()

        def now_ms() -> float:
            return (time.perf_counter() - started) * 1000

        async def ask(prompt: str) -> Outcome:
            sent = now_ms()
            answer = await client.post(PATH, json={"prompt": prompt, "seed": int(sent) % 2**31})
            return _outcome(sent, now_ms(), answer)

        return await run(ask, now_ms)


def _outcome(sent: float, done: float, answer: httpx.Response) -> Outcome:
    model_ms = None
    if answer.status_code == OK:
        model_ms = answer.json()["data"][0].get("ms", {}).get("total")
    headers = (answer.headers.get(name) for name in ("x-eta-ms", "retry-after-ms"))
    eta, retry = (None if value is None else float(value) for value in headers)
    return Outcome(sent, done, answer.status_code, eta, model_ms, retry)
