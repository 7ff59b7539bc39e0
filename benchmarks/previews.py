"""What live previews cost: pictures a second of a server whose eight clients stream, with and without partial pictures.

Three partial pictures and the final one are all evaluations of a picture. Their linear maps and their compression run
beside the device, so the question is what that leaves of the throughput on a machine with few cores. The kinds take
turns in one server; a share is round by round, against the streams without partials.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import harness  # first: it sets the OpenMP policy before torch loads
import load
from serving import CLIENTS, fresh_prompts, ours

KINDS = {"none": (0, "png"), "png": (3, "png"), "jpeg": (3, "jpeg")}
PARTIAL, COMPLETED = b"event: image_generation.partial_image", b"event: image_generation.completed"


async def stream(url: str, prompt: str, seed: int, kind: str) -> bytes:
    """The whole answer of one streaming request, on a connection of its own."""
    parts, (partials, output_format) = urlsplit(url), KINDS[kind]
    asked = {"prompt": prompt, "seed": seed, "stream": True, "partial_images": partials, "output_format": output_format}
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST {load.PATH} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\nconnection: close"
    writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    if answer.count(COMPLETED) != 1 or answer.count(PARTIAL) != partials:
        raise SystemExit(f"a stream of {partials} partials was answered with {answer[:300]!r}")
    return answer


async def pictures_a_second(url: str, kind: str, seconds: float, seed: int) -> float:
    """Closed loop: each client asks again when its stream has ended."""
    prompts, started, done = fresh_prompts(seed), time.perf_counter(), 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            await stream(url, next(prompts), done, kind)
            done += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done / (time.perf_counter() - started)


def measure(url: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Pictures a second of every kind, round by round; a first round is thrown away."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(-1, rounds):
        for place, kind in enumerate(KINDS):
            rate = asyncio.run(pictures_a_second(url, kind, seconds, 100 + len(KINDS) * number + place))
            if number >= 0:
                found[kind].append(rate)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each kind in a round")
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/previews.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ours(Path(scratch)) as server:
        found = measure(server.url, args.rounds, args.seconds)
    row: dict[str, Any] = {
        "model": "default",
        "clients": CLIENTS,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "pictures_per_second": {kind: harness.percentiles(rates) for kind, rates in found.items()},
        "share_of_none": {
            kind: harness.percentiles([a / b for a, b in zip(found[kind], found["none"], strict=True)])
            for kind in ("png", "jpeg")
        },
    }
    print(f"{'partials':<10}{'pictures/s':>12}{'share':>8}")
    for kind, rates in row["pictures_per_second"].items():
        share = row["share_of_none"].get(kind, {"p50": 1.0})["p50"]
        print(f"{kind:<10}{rates['p50']:>12.2f}{share:>8.3f}")
    harness.publish("previews", row, keep=args.keep)


if __name__ == "__main__":
    main()
