"""Load for an images server, from a process of its own: closed loop, or open loop at given arrival times.

In a closed loop each of `clients` asks again as soon as it is answered; in an open loop requests go out when they are
due, whatever has become of the earlier ones. Nothing is retried. Times are milliseconds since the start of the load.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

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
    connections = Connections(url)
    started = time.perf_counter()

    def now_ms() -> float:
        return (time.perf_counter() - started) * 1000

    async def ask(prompt: str) -> Outcome:
        sent = now_ms()
        body = json.dumps({"prompt": prompt, "seed": int(sent) % 2**31}).encode()
        status, headers, answer = await asyncio.wait_for(connections.post(PATH, body), TIMEOUT_S)
        return _outcome(sent, now_ms(), status, headers, answer)

    try:
        return await run(ask, now_ms)
    finally:
        connections.close()


class Connections:
    """Kept-alive HTTP/1.1 connections, one a request under way.

    Bare streams instead of a client library: that one's 2 to 3 ms a request would be taken from the server's cores.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, and body of the answer."""
        while self._idle and self._idle[-1][0].at_eof():  # the server ended it meanwhile
            self._idle.pop()[1].close()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        answer = await reader.readexactly(int(headers["content-length"]))
        self._idle.append((reader, writer))
        return int(lines[0].split()[1]), headers, answer

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def _outcome(sent: float, done: float, status: int, headers: Mapping[str, str], answer: bytes) -> Outcome:
    model_ms = json.loads(answer)["data"][0].get("ms", {}).get("total") if status == OK else None
    eta, retry = (float(headers[name]) if name in headers else None for name in ("x-eta-ms", "retry-after-ms"))
    return Outcome(sent, done, status, eta, model_ms, retry)
