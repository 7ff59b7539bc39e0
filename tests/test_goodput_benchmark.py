"""benchmarks/goodput.py: both servers at a load, with what is answered in time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.mark.slow
def test_both_sides_at_a_load_and_above(root: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, str(root / "benchmarks" / "goodput.py"), "--seconds", "2", "--loads", "0.5", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    below, above = row["points"]
    assert row["sides"] == ["tdm-serve", "baseline"] and row["capacity"] > 0
    for side in row["sides"]:
        assert 0 < below[side]["requests"] < above[side]["requests"]
        in_time = above[side]["goodput"] * row["capacity"] * row["seconds"]
        assert in_time <= above[side]["requests"] - above[side]["refused"] + 0.1
    assert below["tdm-serve"]["refused"] < below["tdm-serve"]["requests"]
    assert above["baseline"]["refused"] == 0  # it knows no refusal
