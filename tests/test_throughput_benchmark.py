"""benchmarks/throughput.py: pictures a second, and no speed for other pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_cell_has_its_speed(root: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, str(root / "benchmarks" / "throughput.py"), "--repeats", "2", "--warmup", "1"]
    done = subprocess.run(
        [*command, "--batches", "1", "3", "--sizes", "64", "128"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout.splitlines()[-1])["cells"]
    assert [(cell["size"], cell["batch"]) for cell in cells] == [(64, 1), (64, 3), (128, 1), (128, 3)]
    for cell in cells:
        assert cell["backend"] == "eager" and cell["nfe"] == 4
        assert cell["denoise_per_second"] > cell["pictures_per_second"] > 0
        assert cell["pictures_per_second"] == pytest.approx(
            1000 * cell["batch"] / cell["milliseconds"]["p50"], rel=1e-2
        )


def test_other_pictures_are_not_timed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sys.modules.pop("throughput", None)
    import throughput  # pyright: ignore[reportMissingImports] - a script beside the package

    sides = {
        "eager": throughput.opened("default", "cpu", "eager"),
        "other": throughput.opened("default-tdm", "cpu", "eager"),
    }
    found = {cell["backend"]: cell for cell in throughput.cells_of(sides, 64, 1, 0, 1)}
    assert "of 255" in found["other"]["failed"] and "pictures_per_second" not in found["other"]
    assert found["eager"]["pictures_per_second"] > 0
    sys.modules.pop("report_speed", None)
    import report_speed  # pyright: ignore[reportMissingImports]

    machine = json.loads((root / "benchmarks" / "results" / "throughput.jsonl").read_text().splitlines()[0])["machine"]
    monkeypatch.setattr(report_speed, "results", lambda _name: [{"cells": [*found.values()], "machine": machine}])
    assert "| `other` | not timed |" in "\n".join(report_speed.throughput())


def test_an_int8_engine_that_nobody_verified_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sys.modules.pop("throughput", None)
    import throughput  # pyright: ignore[reportMissingImports]

    from tdm_serve.artifact import Artifact, write_artifact

    sizes = {"sizes": ((128, 128),), "batch": 1, "text": 16, "sigmas": (1.0,), "nfe": 1, "guidance": 1.0}
    latents = {"channels": 4, "factor": 8, "scale": 1.0, "shift": 0.0, "preview": ()}
    names = {"kind": "onnx", "family": "zimage", "model": "default", "checkpoint_hash": "0", "dtype": "fp32"}
    rest = {"quantise": "int8", "attention": "standard", "parts": {}, "versions": {}, "machine": "cpu"}
    write_artifact(tmp_path, Artifact(**names, **sizes, **latents, **rest))
    with pytest.raises(SystemExit, match="int8 and was not verified"):
        throughput.pipelines("default", "cpu", [tmp_path], compiled=False)
