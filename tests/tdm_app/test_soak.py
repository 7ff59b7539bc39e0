"""Many clients that ask, leave, call off and listen at random: afterwards the server holds what it held before."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

WARM, ROUNDS, CLIENTS = 60, 240, 12  # requests before the first look, requests after it, at the same time
HANDLES = 8  # idle connections and the like may come and go
GROWTH_MB = 48.0  # of resident memory over the soak; a leak of one sample's tensors a request would pass it
PATIENCE_S = 30.0


def body(chance: random.Random, **extra: Any) -> dict[str, Any]:
    side = chance.choice((64, 80, 128))
    prompt = f"{chance.choice(('two', 'three', 'a'))} red circle {chance.randrange(40)}"
    return {"prompt": prompt, "seed": chance.randrange(1000), "size": f"{side}x{side}", **extra}


async def ask(client: httpx.AsyncClient, chance: random.Random) -> None:
    answer = await client.post("/v1/images/generations", json=body(chance, n=chance.choice((1, 1, 2))))
    assert answer.status_code in {200, 429}, answer.text


async def refuse(client: httpx.AsyncClient, chance: random.Random) -> None:
    wrong = chance.choice(({"size": "7x7"}, {"n": 11}, {"model": "none"}, {"deadline_ms": 1}))
    answer = await client.post("/v1/images/generations", json=body(chance) | wrong)
    assert answer.status_code in {400, 404, 429}, answer.text


async def leave(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Goes away in the middle, like a closed tab."""
    with pytest.raises(httpx.TimeoutException):
        await client.post(
            "/v1/images/generations", json=body(chance, n=8), timeout=httpx.Timeout(5, read=chance.uniform(0.01, 0.05))
        )


async def stream(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Listens to the end, or to the first event."""
    asked = body(chance, stream=True, partial_images=chance.randrange(4))
    async with client.stream("POST", "/v1/images/generations", json=asked) as answer:
        assert answer.status_code in {200, 429}
        async for line in answer.aiter_lines():
            if line.startswith("event:") and chance.random() < 0.5:
                return


async def job(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Asks for a job and calls half of them off."""
    accepted = await client.post("/v1/jobs", json=body(chance))
    assert accepted.status_code in {202, 429}, accepted.text
    if accepted.status_code == 202 and chance.random() < 0.5:
        gone = await client.delete(f"/v1/jobs/{accepted.json()['id']}")
        assert gone.status_code in {200, 409}, gone.text


HABITS = (ask, ask, refuse, leave, stream, job)


async def crowd(url: str, requests: int, seed: int) -> None:
    """So many requests of random kinds, CLIENTS at a time."""
    chance, gate = random.Random(seed), asyncio.Semaphore(CLIENTS)

    async def one(habit: Callable[..., Any], own: random.Random) -> None:
        async with gate:
            await habit(client, own)

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        tasks = (one(chance.choice(HABITS), random.Random(chance.random())) for _ in range(requests))
        await asyncio.gather(*tasks)


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return sum(float(found) for found in re.findall(rf"^tdm_serve:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


async def until_idle(url: str) -> None:
    """No slot is held: nothing waits, nothing runs, no request is open but the one that looks."""
    busy: dict[str, float] = {}
    for _ in range(int(PATIENCE_S / 0.1)):
        names = ("num_pictures_waiting", "num_pictures_running", "http_requests_in_flight")
        busy = {name: metric(url, name) for name in names}
        if not any((busy[names[0]], busy[names[1]], busy[names[2]] > 1)):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"still busy after {PATIENCE_S} s: {busy}")


def handles(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_mb(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_crowd_leaves_no_slot_no_handle_and_no_memory_behind(
    start_server: Callable[..., Any], anyio_backend: str
) -> None:
    server = start_server("--no-page")
    server.wait_ready()
    await crowd(server.url, WARM, seed=1)
    await until_idle(server.url)
    before = handles(server.process.pid), resident_mb(server.process.pid)
    await crowd(server.url, ROUNDS, seed=2)
    await until_idle(server.url)
    after = handles(server.process.pid), resident_mb(server.process.pid)
    assert after[0] <= before[0] + HANDLES, f"file handles: {before[0]} before, {after[0]} after"
    assert after[1] <= before[1] + GROWTH_MB, f"MB: {before[1]:.0f} before, {after[1]:.0f} after"
    ended = sum(metric(server.url, f"requests_{how}_total") for how in ("finished", "cancelled", "failed"))
    assert ended == metric(server.url, "requests_accepted_total")
    assert metric(server.url, "requests_failed_total") == 0
    assert server.stop() == 0
    assert "Traceback" not in server.errors()
