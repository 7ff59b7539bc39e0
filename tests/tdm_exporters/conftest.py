"""A tiny Z-Image checkpoint and its ONNX engine, exported once."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_checkpoint

import pytest
from tiny_checkpoint import checkpoint

from tdm_exporters.export import export
from tdm_exporters.options import Options


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    return checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its engine for two sizes and batches up to 3, verified."""
    folder = tmp_path_factory.mktemp("engine") / "onnx"
    report = export(Options(str(tiny), "onnx", folder, sizes=((128, 128), (64, 96)), batch=(1, 3)))
    assert report is not None
    assert report.failures == ()
    return folder
