"""A tiny Z-Image checkpoint and its ONNX engine, exported once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_checkpoint

import pytest
from tiny_checkpoint import Made, checkpoint, options

from tdm_exporters.export import export


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    return checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An engine for two sizes and batches up to 3, verified; its export was interrupted after three parts."""
    folder = tmp_path_factory.mktemp("engine") / "onnx"
    partial, kept = folder.with_name(".onnx.partial"), folder.with_name("kept")
    said: list[str] = []

    def interrupt(line: str) -> None:
        if line.startswith("3/5"):
            raise KeyboardInterrupt

    def listen(line: str) -> None:
        said.append(line)
        if line == "comparing with eager":
            shutil.copytree(partial, kept)

    with pytest.raises(KeyboardInterrupt):
        export(replace(options(tiny, folder), say=interrupt))
    assert partial.is_dir()
    assert not folder.exists()
    report = export(replace(options(tiny, folder), say=listen))
    assert report is not None
    assert report.failures == ()
    assert not partial.exists()
    return Made(folder, kept, tuple(said))


@pytest.fixture(scope="session")
def engine(made: Made) -> Path:
    return made.engine


@pytest.fixture(scope="session")
def with_stubs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a script beside NVIDIA's TensorRT bindings with empty libraries to link to; gives the JSON it ends with."""
    folder, apart = tmp_path_factory.mktemp("stubs"), Path(sys.prefix) / "tensorrt"
    assert apart.is_dir(), f"{apart} is missing; run `make test`"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler, which `--format pt2` needs as well"
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        source = Path(__file__).with_name("tensorrt_stub.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / f"{name}.so.11", source], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(apart)}

    def run(script: Path, *arguments: str) -> Any:
        command = [sys.executable, script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
