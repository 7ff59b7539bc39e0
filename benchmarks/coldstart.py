"""From the start of a process to its first picture: `tdm-serve generate` and `tdm-serve serve`, by backend.

Processes as a user starts them, one after the other, the backends in turn; files are in the system's page cache, whose
state a benchmark without rights over the machine cannot choose. The row's `cells` are one command on one backend each,
in milliseconds since the process was started: `first_picture` for both, and for the server `live` (`/healthz` answers)
and `ready` (`/readyz` does, after warm-up). Every first picture must be eager's, within 2 of 255.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy, which the processes inherit
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from serving import OK, START_S, Server, free_port, picture_of

from tdm_serve.artifact import read_artifact

TDM_SERVE = (sys.executable, "-m", "tdm_serve.cli")
PROMPT, SEED = "two red circles", 7
CLOSE = 2  # of 255: what float engines may differ from eager
POLL_S = 0.005

Pixels = NDArray[np.int64]
Times = Mapping[str, float]


def pixels(png: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int64)


def generate(options: tuple[str, ...], scratch: Path) -> tuple[Times, Pixels]:
    """Milliseconds from the start to the end of `tdm-serve generate`, and its picture."""
    target = scratch / "first.png"
    command = [*TDM_SERVE, "generate", PROMPT, "--seed", str(SEED), "-o", str(target), "--device", "cpu", *options]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    spent = (time.perf_counter() - started) * 1000
    png = target.read_bytes()
    target.unlink()
    return {"first_picture": spent, "total": spent}, pixels(png)


def serve(options: tuple[str, ...], scratch: Path) -> tuple[Times, Pixels]:
    """Milliseconds from the start of `tdm-serve serve` to each of its stages, and its first picture.

    The state folder is new every time, so that the profile of a run before helps nobody.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as state:
        port = free_port()
        server = Server("tdm-serve", f"http://127.0.0.1:{port}", Path(state))
        environment = os.environ | {"TDM_SERVE_STATE_DIR": state}
        command = [*TDM_SERVE, "serve", "--device", "cpu", "--port", str(port), *options]
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            live = first_answer(f"{server.url}/healthz", process, started)
            ready = first_answer(f"{server.url}/readyz", process, started)
            answer = picture_of(server, PROMPT, SEED).raise_for_status()
            spent = (time.perf_counter() - started) * 1000
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    png = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return {"live": live, "ready": ready, "first_picture": spent, "total": spent}, pixels(png)


def first_answer(url: str, process: subprocess.Popen[bytes], started: float) -> float:
    """Milliseconds from `started` to the first good answer."""
    while process.poll() is None and time.perf_counter() - started < START_S:
        try:
            if httpx.get(url, timeout=5).status_code == OK:
                return (time.perf_counter() - started) * 1000
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    raise SystemExit(f"{url} did not answer within {START_S} s of the start")


COMMANDS = {"generate": generate, "serve": serve}


def backends(engines: list[Path]) -> dict[str, tuple[str, ...]]:
    """Options of every backend by name: eager, and the engines."""
    found: dict[str, tuple[str, ...]] = {"eager": ("--backend", "eager")}
    for engine in engines:
        kind = read_artifact(engine).kind
        found[kind] = ("--backend", kind, "--engine", str(engine))
    return found


def checked(start: Callable[[], tuple[Times, Pixels]], name: str, right: Pixels, _round: int) -> Times:
    """The times of one start. Raises SystemExit where its picture is another."""
    times, picture = start()
    if (off := int(np.abs(picture - right).max())) > CLOSE:
        raise SystemExit(f"the first picture of {name} differs from eager's by {off} of 255, so no time is published")
    return times


def measure(engines: list[Path], repeats: int, scratch: Path) -> dict[str, Any]:
    """The row."""
    _, right = generate(("--backend", "eager"), scratch)
    contenders: dict[str, Callable[[int], Times]] = {}
    for command, run in COMMANDS.items():
        for backend, options in backends(engines).items():
            name = f"{command} {backend}"
            contenders[name] = partial(checked, partial(run, options, scratch), name, right)
    found = harness.interleaved(contenders, warmup=1, repeats=repeats)
    cells: list[dict[str, Any]] = []
    for name, rounds in found.items():
        command, backend = name.split()
        stages = {stage: spread for stage, spread in harness.summarise(rounds).items() if stage != "total"}
        cells.append({"command": command, "backend": backend, "milliseconds": stages})
    return {"model": "default", "repeats": repeats, "cells": cells}


def table(row: Mapping[str, Any]) -> str:
    """Medians, one line a cell."""
    stages = ("live", "ready", "first_picture")
    lines = [f"{'':<22}" + "".join(f"{stage:>15}" for stage in stages)]
    for cell in row["cells"]:
        values = [cell["milliseconds"].get(stage, {}).get("p50", "") for stage in stages]
        lines.append(f"{cell['command']} {cell['backend']}".ljust(22) + "".join(f"{value:>15}" for value in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "engines", nargs="*", type=Path, metavar="DIR", help="engines of `default`, by tdm-serve export"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/coldstart.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(arguments.engines, arguments.repeats, Path(scratch))
    print(table(row))
    harness.publish("coldstart", row, keep=arguments.keep)


if __name__ == "__main__":
    main()
