"""docs/export.md: its example, from a fine-tuned checkpoint to a picture by the OpenAI client, runs as it stands."""

from __future__ import annotations

import argparse
import json
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


def test_its_numbers_are_measured_ones(text: str, root: Path) -> None:
    """Those of the last row that benchmarks/export.py kept."""
    row = json.loads((root / "benchmarks" / "results" / "export.jsonl").read_text().splitlines()[-1])
    for batch, sides in row["milliseconds"].items():
        for name, stages in sides.items():
            ratio = row["eager_over"][batch].get(name)
            times = " | ".join(f"{stages[stage]['p50']:.1f}" for stage in ("text", "denoise", "decode", "total"))
            faster = f"{ratio['p50']:.2f}x" if ratio else ""
            assert f"| {batch} | {name} | {times} | {faster} |" in text
    scores = {name: engine["score"] for name, engine in row["engines"].items()}
    assert f"{scores['onnx int8']['before']:.3f} before and {scores['onnx int8']['after']:.3f} after" in text
    megabytes = {name: sum(engine["mb"].values()) for name, engine in row["engines"].items()}
    assert f"{megabytes['onnx']:.1f} MB in float32, {megabytes['onnx int8']:.1f} MB in int8" in text


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
