"""How an export begins, goes on, fails and ends: whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import Made, checkpoint, options

from tdm_exporters import verify
from tdm_exporters.compare import Beside
from tdm_exporters.export import export
from tdm_exporters.families import EXPORTABLE
from tdm_exporters.options import Options
from tdm_exporters.parts import Limits
from tdm_exporters.verify import TOLERANCES, Tolerance, tolerance_of
from tdm_serve import Pipeline
from tdm_serve.artifact import read_artifact
from tdm_serve.backends.exported import load_exported
from tdm_serve.cli.main import main
from tdm_serve.engine import Engine
from tdm_serve.errors import InvalidRequest, OutputError
from tdm_serve.models.load import load


def test_an_interrupted_export_goes_on_behind_its_last_part(made: Made) -> None:
    parts = [line for line in made.said if line[1:2] == "/"]
    assert [line.endswith("kept from before") for line in parts] == [True, True, True, False, False]
    assert made.said[0].startswith("loading")
    assert sorted(path.name for path in made.engine.iterdir()) == [
        *("artifact.json", "decoder.onnx", "denoiser.onnx", "modulation.onnx"),
        *("refiner.onnx", "report.json", "text_encoder.onnx"),
    ]


def command(tiny: Path, folder: Path) -> list[str]:
    sizes = ["--sizes", "128x128,64x96", "--batch", "1-3"]
    return ["export", str(tiny), "--format", "onnx", "-o", str(folder), *sizes, "--score-prompts", "0"]


def test_what_is_not_eagers_equal_is_not_published(
    made: Made, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tolerance is what makes it fail; everything else is as always."""
    shutil.copytree(made.partial, tmp_path / ".out.partial")
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(1e-12, 1e-12, 0.0, 0.0))
    assert main(command(tiny, tmp_path / "out")) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert "error: not published" in complaint
    assert "has a relative error of" in complaint
    assert any(part in complaint for part in ("denoiser", "decoder", "refiner", "modulation", "text_encoder"))
    assert list(tmp_path.iterdir()) == []


def test_a_verified_export_ends_with_its_folder(
    made: Made, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.partial, tmp_path / ".out.partial")
    assert main(command(tiny, tmp_path / "out")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "out")
    assert any(line.startswith("denoiser") and "relative error" in line for line in printed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_verification_there_is_no_report(made: Made, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(made.partial, tmp_path / ".out.partial")
    assert main([*command(tiny, tmp_path / "out"), "--no-verify"]) == 0
    assert not (tmp_path / "out" / "report.json").exists()
    assert read_artifact(tmp_path / "out").report == ""


def test_an_export_of_another_kind_starts_afresh(made: Made, tiny: Path, tmp_path: Path) -> None:
    """It would otherwise take up graphs that were made for other limits."""
    shutil.copytree(made.partial, tmp_path / ".out.partial")
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if line.startswith("1/5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(Options(str(tiny), "onnx", tmp_path / "out", batch=(1, 2), say=stop))
    assert not said[-1].endswith("kept from before")


def test_a_changed_part_is_made_anew(made: Made, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(made.partial, tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "modulation.onnx").write_bytes(b"cut short")
    said: list[str] = []
    export(replace(options(tiny, tmp_path / "out"), verify=False, say=said.append))
    assert [line.endswith("kept from before") for line in said[1:]] == [False, True, True, True, True]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond some bytes: the system answers as a full disk does, with an OSError.

    Not a fixture: pytest's own output may go to a file, and is written before fixtures end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    with small_files(), pytest.raises(OutputError, match=r"cannot write .*out: File too large; nothing was kept"):
        export(Options(str(tiny), "onnx", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_half_precision_is_verified_by_its_own_limits(tiny: Path, tmp_path: Path) -> None:
    report = export(Options(str(tiny), "onnx", tmp_path / "out", dtype="fp16"))
    assert report is not None
    assert report.failures == ()
    assert all(1e-4 < row["largest_relative"] < 2e-2 for row in report.parts.values())
    [picture] = Pipeline.from_pretrained(tiny, engine=tmp_path / "out")("a star", seed=1)
    assert picture.nfe == 4


def test_a_taken_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        export(Options(str(tiny), "onnx", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": (2, 4)}, "--batch 2-4 begins at 2; allowed: 1-MAX"),
        ({"sizes": ((128, 100),)}, "--sizes has 128x100; .* multiples of 16 between 64 and 256"),
        ({"text": 65}, "--text-len is 65; .* reads at most 64 tokens"),
        ({"quantise": "int8", "dtype": "fp16"}, "--quantise int8 needs --format onnx and --dtype fp32"),
        ({"dtype": "bf16"}, "--dtype bf16 cannot be verified here"),
        ({"body": False}, "--no-function-body needs --attention plugin; it is standard"),
        ({"body": False, "attention": "plugin"}, "add --no-verify"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused(tiny: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        export(replace(Options(str(tiny), "onnx", tmp_path / "out"), **change))  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_other_weights(tiny: Path, made: Made, tmp_path: Path) -> None:
    """An engine beside a checkpoint of the same shape: every graph is off, and the worst is named first."""
    artifact = read_artifact(made.engine)
    other = load(checkpoint(tmp_path / "other", seed=9), "cpu", "float32")
    with torch.no_grad():
        parts = EXPORTABLE["zimage"].parts_of(other.model, Limits(artifact.batch, artifact.sizes, artifact.text))
    beside = Beside.of(parts)
    opened, backend = load_exported(tiny, made.engine, "auto", "cpu", wrap=beside.over)
    ours, theirs = Pipeline(Engine(opened, backend)), Pipeline(Engine(other))
    report = verify.verify(theirs, ours, beside, artifact, score=lambda one: float(one is theirs))
    assert {failure.partition(":")[0] for failure in report.failures[:5]} == set(artifact.parts)
    worst = max(report.parts.values(), key=lambda row: row["largest_relative"])
    assert worst["worst"] in report.failures[0]
    assert "the strict score fell from 1.000 to 0.000" in report.failures[-1]


def test_every_type_has_its_tolerance(made: Made) -> None:
    artifact = read_artifact(made.engine)
    found = [tolerance_of(replace(artifact, dtype=dtype)).largest for dtype in ("fp32", "fp16", "bf16")]
    assert found == sorted(found)
    assert tolerance_of(replace(artifact, quantise="int8")).largest > found[0]
