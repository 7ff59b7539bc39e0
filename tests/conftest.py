"""Settings that must be there before torch loads, and fixtures that several folders share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # results must not depend on it, and CI machines are small
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tdm_serve import Pipeline

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = [ROOT, *(ROOT / name for name in ("app", "exporters", "finetune", "kernels"))]

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For processes that a test starts: they find this checkout whether or not it is installed."""
    known = os.environ.get("PYTHONPATH", "")
    paths = [*map(str, PACKAGE_FOLDERS), *([known] if known else [])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def cli(environment: dict[str, str]) -> Cli:
    """`cli("generate", "two red circles", cwd=folder)` runs the real command in a process of its own."""

    def run(*arguments: str, cwd: Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tdm_serve.cli", *arguments]
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """`refused(["generate", " "])` runs a command in an empty folder and returns its complaint.

    It must end with exit code 2 and one sentence on stderr, and leave no file.
    """
    from tdm_serve.cli.main import main

    def run(arguments: list[str]) -> str:
        folder = tmp_path / "empty"
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse exits, our own errors return; a shell sees no difference
            code = stop.code
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "")
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert not list(folder.iterdir())
        return printed.err

    return run


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """The embedded default checkpoint, loaded once."""
    from tdm_serve import Pipeline

    return Pipeline.from_pretrained("default")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's Chromium."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs Chromium: no chromium, chromium-browser or google-chrome on PATH")
