"""The service under load, beside the plain FastAPI + diffusers server of `baseline_server.py`, in one run.

Both: same weights, dtype, threads, OpenMP policy, text length, schedule and output format; both are up throughout,
but only one is loaded at a time. The load comes from this process, on the same cores. First both must make the same
picture. Then, in this order: alone (one client), closed loop (eight clients, in turn), the same with prompts seen
before and in bfloat16 (ours only), Poisson arrivals at 0.8 of our capacity against the virtual clock with the
measured profile and the same arrivals, bursts, and Poisson arrivals at twice the capacity.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness  # first: it sets the OpenMP policy before torch loads
import httpx
import load
import numpy as np
import virtual
from load import OK, REFUSED, Outcome

from tdm_finetune.scenes.prompts import prompts as scene_prompts

HERE = Path(__file__).resolve().parent
CLIENTS = 8
STEADY, OVERLOAD = 0.8, 2.0  # arrivals a second, as a share of our capacity
LONGEST_WAIT_S = 5  # in the overload run, whose queue is full for most of it then
LATE = 1.10  # an accepted request is late when it takes more than so many times what was promised
SEEN = ("two red circles", "a white cross", "a blue ring left of a star", 'the word "CAT" in green')
START_S = 180


class Server(NamedTuple):
    """A running server."""

    name: str
    url: str
    state: Path


@contextlib.contextmanager
def running(name: str, command: Sequence[str], state: Path) -> Generator[Server]:
    """A server process of this benchmark, from its first answer on."""
    port = free_port()
    server = Server(name, f"http://127.0.0.1:{port}", state)
    environment = os.environ | {"TDM_SERVE_STATE_DIR": str(state)}
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        wait_until_it_answers(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(server: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if picture_of(server).status_code == OK:
                return
        time.sleep(0.2)
    raise SystemExit(f"the server {server.name} did not answer within {START_S} s")


def picture_of(server: Server, prompt: str = SEEN[0], seed: int = 7) -> httpx.Response:
    return httpx.post(server.url + load.PATH, json={"prompt": prompt, "seed": seed}, timeout=60)


def ours(state: Path, *options: str) -> contextlib.AbstractContextManager[Server]:
    """Our service, as a user starts it."""
    command = ["-m", "tdm_serve.cli", "serve", "--device", "cpu", "--no-page", *options]
    return running("tdm-serve", command, state)


def baseline(folder: Path, state: Path) -> contextlib.AbstractContextManager[Server]:
    """The plain server over the same weights."""
    return running("baseline", [str(HERE / "baseline_server.py"), str(folder)], state)


def fresh_prompts(seed: int) -> Iterator[str]:
    """Prompts that no server has seen."""
    seen: set[str] = set()
    for prompt in scene_prompts("train", seed=seed):
        if prompt.text not in seen:
            seen.add(prompt.text)
            yield prompt.text


def answered(outcomes: Sequence[Outcome]) -> list[float]:
    """Latencies of what was answered, milliseconds."""
    return [outcome.latency_ms for outcome in outcomes if outcome.status == OK]


def rate(outcomes: Sequence[Outcome]) -> float:
    """Pictures a second, from the first request to the last answer."""
    done = [outcome.done_ms for outcome in outcomes if outcome.status == OK]
    return len(done) / (max(done) - min(outcome.sent_ms for outcome in outcomes)) * 1000


def must_be_answered(outcomes: Sequence[Outcome], *allowed: int) -> None:
    """No number from a run in which a server failed."""
    strange = {outcome.status for outcome in outcomes} - {OK, *allowed}
    if strange:
        raise SystemExit(f"a server answered {sorted(strange)}, so no number is published")


def alone(server: Server, seconds: float) -> dict[str, Any]:
    """One client: latency, and what of it is not the model."""
    outcomes = load.closed(server.url, fresh_prompts(1), clients=1, seconds=seconds)
    must_be_answered(outcomes)
    overhead = [outcome.latency_ms - outcome.model_ms for outcome in outcomes if outcome.model_ms is not None]
    found: dict[str, Any] = {"latency_ms": virtual.tail(answered(outcomes))}
    return found | ({"overhead_ms": harness.percentiles(overhead)} if overhead else {})


def throughput(server: Server, prompts: Iterator[str], seconds: float) -> float:
    """Pictures a second with eight clients."""
    outcomes = load.closed(server.url, prompts, clients=CLIENTS, seconds=seconds)
    must_be_answered(outcomes)
    return round(rate(outcomes), 3)


def promises(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How well the server kept its word: relative errors of the promised times, and the share that was late."""
    kept = [(o.latency_ms, o.eta_ms) for o in outcomes if o.status == OK and o.eta_ms is not None]
    if not kept:
        return {}
    errors = [abs(latency - eta) / eta for latency, eta in kept]
    late = sum(latency > LATE * eta for latency, eta in kept)
    span_s = (max(o.done_ms for o in outcomes) - outcomes[0].sent_ms) / 1000
    return {
        "eta_error_p50": q(errors, 50),
        "eta_error_p95": q(errors, 95),
        "late": round(late / len(kept), 4),
        "on_time_per_second": round((len(kept) - late) / span_s, 3),
    }


def q(values: Sequence[float], percentile: float) -> float:
    return round(float(np.percentile(values, percentile)), 4)


def arrivals_of(server: Server, arrivals: Sequence[float]) -> dict[str, Any]:
    """An open loop: latencies, rate, refusals, promises."""
    outcomes = load.opened(server.url, fresh_prompts(2), arrivals)
    must_be_answered(outcomes, REFUSED)
    refused = [outcome for outcome in outcomes if outcome.status == REFUSED]
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "refused": len(refused),
        "pictures_per_second": round(rate(outcomes), 3),
        "latency_ms": virtual.tail(answered(outcomes)),
        "curve_ms": virtual.curve(answered(outcomes)),
        **promises(outcomes),
    }
    if refused and all(outcome.retry_after_ms is None for outcome in refused):
        raise SystemExit("a refusal came without retry-after-ms")
    return found


def simulated(server: Server, arrivals: Sequence[float], latency_ms: Mapping[str, float]) -> dict[str, Any]:
    """What the virtual clock makes of the same arrivals with the profile that the server left when it ended."""
    found = virtual.latencies(server.state, fresh_prompts(2), arrivals)
    return {"simulated": found, "p95_over_simulated": round(latency_ms["p95"] / found["p95"], 3)}


def in_turn(sides: Sequence[Server], rounds: int, seconds: float) -> dict[str, Any]:
    """Closed loops A B A B, so that a machine's drift hits both alike."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for index in range(rounds):
        for side in sides:
            rates[side.name].append(throughput(side, fresh_prompts(10 + index), seconds))
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    return {"pictures_per_second": rates, "ratio": harness.percentiles(ratios)}


def measure(rounds: int, seconds: float, scratch: Path) -> dict[str, Any]:
    """Everything, as one result row."""
    from tdm_serve.convert import convert

    plain = convert("default", scratch / "plain")
    row: dict[str, Any] = {"clients": CLIENTS, "seconds": seconds, "rounds": rounds}
    with ours(scratch / "ours") as mine, baseline(plain, scratch / "baseline") as theirs:
        row["largest_difference"] = check_same(mine, theirs)
        row["alone"] = {side.name: alone(side, seconds) for side in (mine, theirs)}
        row["closed"] = in_turn((mine, theirs), rounds, seconds)
        row["seen_prompts"] = {"pictures_per_second": throughput(mine, itertools.cycle(SEEN), seconds)}
        capacity = float(np.median(row["closed"]["pictures_per_second"][mine.name]))
        row["capacity"] = round(capacity, 3)
        burst = load.bursts(CLIENTS, CLIENTS / (STEADY * capacity), 2 * seconds)
        row["bursts"] = {mine.name: arrivals_of(mine, burst), theirs.name: arrivals_of(theirs, burst)}
        steady = load.poisson(STEADY * capacity, 6 * seconds, seed=1)
        row["steady"] = {theirs.name: arrivals_of(theirs, steady), mine.name: arrivals_of(mine, steady)}
    row["steady"][mine.name] |= simulated(mine, steady, row["steady"][mine.name]["latency_ms"])
    with ours(scratch / "ours", "--max-wait-s", str(LONGEST_WAIT_S)) as brief:
        overload = arrivals_of(brief, load.poisson(OVERLOAD * capacity, 4 * seconds, seed=2))
        row["overload"] = overload | {"goodput": round(overload["on_time_per_second"] / capacity, 3)}
    with ours(scratch / "bfloat16", "--dtype", "bfloat16") as half:
        row["bfloat16"] = {"pictures_per_second": throughput(half, fresh_prompts(3), seconds)}
    return row


def check_same(mine: Server, theirs: Server) -> int:
    """Largest difference in 8-bit values; more than 2 ends the benchmark without a number."""
    import base64
    import io

    from PIL import Image

    worst = 0
    for seed, prompt in enumerate(SEEN):
        answers = (picture_of(side, prompt, seed).json()["data"][0]["b64_json"] for side in (mine, theirs))
        one, other = (np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int) for text in answers)
        worst = max(worst, int(np.abs(one - other).max()))
    if worst > 2:
        raise SystemExit(f"the pictures differ by {worst} of 255, so no number is published")
    return worst


def table(row: Mapping[str, Any]) -> str:
    """The row for people."""
    lines = [f"{'':<26}{'tdm-serve':>12}{'baseline':>12}"]

    def line(name: str, mine: object, theirs: object = "") -> None:
        lines.append(f"{name:<26}{mine!s:>12}{theirs!s:>12}")

    own, other = row["alone"].values()
    line("alone, p50 ms", own["latency_ms"]["p50"], other["latency_ms"]["p50"])
    line("  outside the model", own["overhead_ms"]["p50"])
    rates = [q(values, 50) for values in row["closed"]["pictures_per_second"].values()]
    line(f"{row['clients']} clients, pictures/s", *rates)
    line("  ratio, pair by pair", row["closed"]["ratio"]["p50"])
    line("  prompts seen before", row["seen_prompts"]["pictures_per_second"])
    line("  bfloat16", row["bfloat16"]["pictures_per_second"])
    for name in ("steady", "bursts"):
        one, two = row[name]["tdm-serve"], row[name]["baseline"]
        line(f"{name}, p95 ms", one["latency_ms"]["p95"], two["latency_ms"]["p95"])
        line("  promise error, p95", one["eta_error_p95"])
    line("  p95 over simulated", row["steady"]["tdm-serve"]["p95_over_simulated"])
    line("overload, goodput", row["overload"]["goodput"])
    line("  accepted and late", row["overload"]["late"])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each closed loop; open loops take longer")
    parser.add_argument("--keep", action="store_true", help="append the row to the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(args.rounds, args.seconds, Path(scratch))
    print(table(row))
    harness.publish("serving", row, keep=args.keep)


if __name__ == "__main__":
    main()
