"""docs/export.md: its example, from a fine-tuned checkpoint to a picture by the OpenAI client, runs as it stands."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tdm_serve.cli.export import add_arguments

BLOCK = re.compile(r"^<!-- test -->\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_options_exist(text: str) -> None:
    """Each named in the text is one of `export`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    named = set(re.findall(r"`(--[a-z-]+)", text)) - {"--backend"}
    assert len(named) > 5
    assert named <= set(parser._option_string_actions)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_runs(text: str, tmp_path: Path, environment: dict[str, str]) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (_, commands), (_, client) = BLOCK.findall(text)
    programs = tmp_path / ".programs"
    programs.mkdir()
    (programs / "tdm-serve").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tdm_serve.cli "$@"\n')
    (programs / "tdm-serve").chmod(0o755)
    variables = environment | {
        "PATH": os.pathsep.join([str(programs), environment["PATH"]]),
        "TDM_SERVE_STATE_DIR": str(tmp_path / "state"),
    }
    (tmp_path / "client.py").write_text(client)
    script = f'{commands}\n"{sys.executable}" client.py\n'
    with (tmp_path / "output").open("w") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(timeout=850)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)  # the server, and everything where it took too long
    assert code == 0, (tmp_path / "output").read_text()[-2000:]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (128, 128)
