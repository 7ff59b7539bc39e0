"""benchmarks/coldstart.py: real processes, in the order in which things come up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.mark.slow
def test_from_a_new_process_to_the_first_picture(root: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, str(root / "benchmarks" / "coldstart.py"), "--repeats", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout.splitlines()[-1])["cells"]
    assert [(cell["command"], cell["backend"]) for cell in cells] == [("generate", "eager"), ("serve", "eager")]
    serve = {stage: spread["p50"] for stage, spread in cells[1]["milliseconds"].items()}
    assert 0 < serve["live"] <= serve["ready"] <= serve["first_picture"]
    assert "live" not in cells[0]["milliseconds"] and cells[0]["milliseconds"]["first_picture"]["p50"] > 0
