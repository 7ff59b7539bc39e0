"""Whether fresh results have lost against the committed ones: speed over the peers of the same run, not milliseconds.

    TDM_BENCH_RESULTS=build/fresh python benchmarks/latency.py --keep
    python benchmarks/regress.py build/fresh

A machine has slow days, which hit both sides of a run alike; so what is compared is how much faster we were than each
peer in the same run. Every fresh row is held against the newest committed row of the same measurement on the same
machine (device, cores, threads). It has lost where the median ratio fell by more than a tenth and the two runs' ranges,
from p20 to p80, lie apart: a noisy run alone is no loss. Exit code 1 with a sentence for each loss; rows that nothing
can be held against are named, too, and 2 says that there was none that could.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ALLOWED = 0.10  # share of a ratio that may be lost
MACHINE = ("device", "cores", "threads", "omp_wait_policy")
OURS = {"tdm-serve", "tdm-serve compiled", "ONNX Runtime"}  # in latency rows

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as a peer: p20, p50 and p80 over the rounds of a run."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, spread: Mapping[str, float]) -> Ratio:
        return cls(spread["p20"], spread["p50"], spread["p80"])

    def lost(self, before: Ratio) -> bool:
        return self.middle < (1 - ALLOWED) * before.middle and self.high < before.low


Key = tuple[Any, ...]  # what makes two ratios the same measurement


def of_latency(row: Row) -> Iterator[tuple[Key, Ratio]]:
    """Every peer's milliseconds over ours; our own other backends are no peers."""
    for peer in row.get("ratios", {}).keys() - OURS:
        spread = row["ratios"][peer]
        yield (row["model"], row["size"], row["batch"], row["dtype"], f"over {peer}"), Ratio.of(spread)


def of_serving(row: Row) -> Iterator[tuple[Key, Ratio]]:
    """Our pictures a second over the baseline's, eight clients."""
    yield (f"{row['clients']} clients", "over the plain server"), Ratio.of(row["closed"]["ratio"])


def of_export(row: Row) -> Iterator[tuple[Key, Ratio]]:
    """Every engine's speed over eager torch."""
    for batch, engines in row["eager_over"].items():
        for engine, spread in engines.items():
            if engine != "eager":
                yield (row["model"], row["size"], f"batch {batch}", f"{engine} over eager"), Ratio.of(spread)


RATIOS: dict[str, Callable[[Row], Iterator[tuple[Key, Ratio]]]] = {
    "latency": of_latency,
    "serving": of_serving,
    "export": of_export,
}


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ratios(folder: Path, name: str) -> dict[Key, Ratio]:
    """The newest ratio of every measurement and machine in a folder of results."""
    found: dict[Key, Ratio] = {}
    for row in rows(folder / f"{name}.jsonl"):
        machine = tuple(row["machine"][fact] for fact in MACHINE)
        found |= {(name, *key, machine): ratio for key, ratio in RATIOS[name](row)}
    return found


def compare(fresh: Path, committed: Path) -> tuple[list[str], list[str], int]:
    """Losses and what could not be compared, as sentences, and how many ratios were compared."""
    losses: list[str] = []
    alone: list[str] = []
    compared = 0
    for name in RATIOS:
        before = ratios(committed, name)
        for key, now in ratios(fresh, name).items():
            what = " ".join(map(str, key[:-1]))
            if key not in before:
                alone.append(f"{what}: no committed row of this machine")
                continue
            compared += 1
            if now.lost(then := before[key]):
                losses.append(
                    f"{what}: {now.middle:.2f}x ({now.low:.2f} to {now.high:.2f}), committed {then.middle:.2f}x "
                    f"({then.low:.2f} to {then.high:.2f}): {1 - now.middle / then.middle:.0%} lost"
                )
    return losses, alone, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fresh", type=Path, help="folder with the rows of a new run")
    parser.add_argument("--committed", type=Path, default=RESULTS, help="folder to hold them against")
    arguments = parser.parse_args()
    if not arguments.fresh.is_dir():
        parser.error(f"{arguments.fresh} is no folder; name the one that TDM_BENCH_RESULTS named in the run")
    losses, alone, compared = compare(arguments.fresh, arguments.committed)
    print("\n".join([*alone, *losses, f"{compared} ratios compared, {len(losses)} lost more than {ALLOWED:.0%}"]))
    raise SystemExit(2 if not compared else 1 if losses else 0)


if __name__ == "__main__":
    main()
