"""Runs the files of `interpreted/`, each in a process with Triton's interpreter on. See the conftest there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
SLOW = [name for name in FILES if "pytest.mark.slow" in (FOLDER / name).read_text()]
QUICK = ("test_attention.py", "test_interpreter_defects.py")  # the others come with the slow tests


def test_there_are_files() -> None:
    assert "test_attention.py" in FILES


def run(name: str, marks: str, root: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("triton", reason="kernels are interpreted by Triton, which is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER / name), "-q", "-p", "no:cacheprovider", "-m", marks],
        cwd=root,
        env=environment | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
def test_interpreted(name: str, root: Path, environment: dict[str, str]) -> None:
    run(name, "not slow", root, environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_interpreted_slowly(name: str, root: Path, environment: dict[str, str]) -> None:
    run(name, "slow", root, environment)
