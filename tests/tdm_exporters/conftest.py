"""A tiny Z-Image checkpoint and its ONNX engine, exported once."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

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
