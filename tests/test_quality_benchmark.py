"""benchmarks/quality.py: rows with counted evaluations, and what is untrained marked so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def test_score_against_counted_evaluations(root: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, str(root / "benchmarks" / "quality.py"), "--n", "7", "--most-steps", "4"]
    done = subprocess.run(
        [*command, "--models", "default-teacher", "default"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [(row["model"], row["steps"], row["guidance"], row["nfe"], row["untrained"]) for row in rows]
    assert found == [
        ("default-teacher", 2, 3.0, 4, False),  # a guided step is two evaluations
        ("default-teacher", 4, 3.0, 8, False),
        ("default-teacher", 4, 1.0, 4, False),
        ("default", 1, 1.0, 1, True),
        ("default", 2, 1.0, 2, True),
        ("default", 4, 1.0, 4, False),
    ]
    assert all(row["strict_low"] <= row["strict"] <= row["strict_high"] for row in rows)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval(
    root: Path, monkeypatch: pytest.MonkeyPatch, right: int, n: int, low: float, high: float
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sys.modules.pop("quality", None)
    from quality import wilson  # pyright: ignore[reportMissingImports] - a script beside the package

    assert wilson(right / n, n) == pytest.approx((low, high), abs=2e-4)
