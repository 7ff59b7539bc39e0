"""Runs the README's commands, so that it cannot say what does not work.

A fenced bash block is run when the line before it is `<!-- test -->`. The blocks run in order in one temporary folder,
because later ones use what earlier ones wrote.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^<!-- test -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 240


def blocks() -> list[str]:
    """The marked blocks of the README."""
    return BLOCK.findall(README.read_text(encoding="utf-8")) if README.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks run, with this checkout's `tdm-serve` and `python` first on the PATH."""
    folder = tmp_path_factory.mktemp("readme")
    programs = folder / ".programs"
    programs.mkdir()
    for name, arguments in {"tdm-serve": "-m tdm_serve.cli", "python": ""}.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    return folder


def test_readme_has_blocks_to_run() -> None:
    assert blocks(), "README.md has no bash block after a line `<!-- test -->`"


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.strip().splitlines()[0][:60])
def test_block_runs(block: str, folder: Path, environment: dict[str, str]) -> None:
    variables = environment | {"PATH": os.pathsep.join([str(folder / ".programs"), environment.get("PATH", "")])}
    with (
        (folder / ".output").open("w") as output,
        subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as shell,
    ):
        try:
            code = shell.wait(timeout=TIMEOUT_S)
        finally:
            _end(shell.pid)
    assert code == 0, (folder / ".output").read_text(encoding="utf-8", errors="replace")


def _end(group: int) -> None:
    """Ends what a block left in the background, such as a server."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
