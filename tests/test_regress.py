"""benchmarks/regress.py: what has lost against the committed rows, and what only looks like it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Change = Callable[[dict[str, Any]], None]


def regress(root: Path, fresh: Path, committed: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "regress.py"), str(fresh), "--committed", str(committed)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def changed(source: Path, target: Path, change: Change) -> None:
    """The newest row of a result file, changed, in a folder of its own."""
    row = json.loads(source.read_text().splitlines()[-1])
    change(row)
    target.mkdir(exist_ok=True)
    (target / source.name).write_text(json.dumps(row) + "\n")


def scaled(spread: dict[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in spread.items()}


@pytest.fixture
def committed(root: Path, tmp_path: Path) -> Path:
    """The real rows."""
    return Path(shutil.copytree(root / "benchmarks" / "results", tmp_path / "committed"))


def test_the_committed_rows_have_not_lost_to_themselves(root: Path, committed: Path) -> None:
    done = regress(root, committed, committed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" ratios compared")[0].split()[-1]) >= 8


@pytest.mark.parametrize(("factor", "code"), [(0.6, 1), (0.93, 0), (1.5, 0)])
def test_a_lost_tenth(root: Path, committed: Path, tmp_path: Path, factor: float, code: int) -> None:
    def slower(row: dict[str, Any]) -> None:
        row["closed"]["ratio"] = scaled(row["closed"]["ratio"], factor)

    changed(committed / "serving.jsonl", tmp_path / "fresh", slower)
    done = regress(root, tmp_path / "fresh", committed)
    assert done.returncode == code, done.stdout
    assert ("serving 8 clients over the plain server" in done.stdout) == (code == 1)


def test_a_slow_day_is_no_loss(root: Path, committed: Path, tmp_path: Path) -> None:
    def slow_machine(row: dict[str, Any]) -> None:
        row["milliseconds"] = json.loads(json.dumps(row["milliseconds"]), parse_float=lambda text: 3 * float(text))

    changed(committed / "latency.jsonl", tmp_path / "fresh", slow_machine)
    assert regress(root, tmp_path / "fresh", committed).returncode == 0


def test_a_noisy_run_is_no_loss(root: Path, committed: Path, tmp_path: Path) -> None:
    def noisy(row: dict[str, Any]) -> None:
        spread = row["closed"]["ratio"]
        row["closed"]["ratio"] = {"p20": spread["p20"] * 0.5, "p50": spread["p50"] * 0.8, "p80": spread["p80"]}

    changed(committed / "serving.jsonl", tmp_path / "fresh", noisy)
    assert regress(root, tmp_path / "fresh", committed).returncode == 0


def test_another_machine_is_not_compared(root: Path, committed: Path, tmp_path: Path) -> None:
    def elsewhere(row: dict[str, Any]) -> None:
        row["machine"]["device"] = "another"

    changed(committed / "export.jsonl", tmp_path / "fresh", elsewhere)
    done = regress(root, tmp_path / "fresh", committed)
    assert done.returncode == 2 and "no committed row of this machine" in done.stdout


def test_a_folder_that_is_not_there(root: Path, committed: Path, tmp_path: Path) -> None:
    done = regress(root, tmp_path / "nothing", committed)
    assert done.returncode == 2 and f"{tmp_path / 'nothing'} is no folder" in done.stderr
