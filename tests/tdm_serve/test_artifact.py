"""The manifest of an exported engine: read as written, and a reason for everything that does not match."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tdm_serve.artifact import (
    MANIFEST,
    REPORT,
    Artifact,
    check_checkpoint,
    check_files,
    check_kind,
    fact_of,
    read_artifact,
    report_digest,
    write_artifact,
)
from tdm_serve.errors import ArtifactError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One part in one file, with a report."""
    (tmp_path / "denoiser.onnx").write_bytes(b"graph")
    (tmp_path / REPORT).write_text("{}")
    artifact = Artifact(
        kind="onnx", family="zimage", model="default", checkpoint_hash="abc", dtype="fp32", quantise="none",
        attention="standard", sizes=((128, 128), (64, 96)), batch=4, text=64, sigmas=(1.0, 0.9, 0.75, 0.5), nfe=4,
        guidance=1.0, channels=4, factor=8, scale=0.5, shift=-0.25, preview=((1.0, 2.0, 3.0),),
        parts={"denoiser": (fact_of(tmp_path / "denoiser.onnx"),)}, versions={"torch": "2.13.0"}, machine="a processor",
        report=report_digest(tmp_path),
    )  # fmt: skip
    write_artifact(tmp_path, artifact)
    return tmp_path


def test_it_is_read_as_it_was_written(folder: Path) -> None:
    artifact = read_artifact(folder)
    check_files(folder, artifact)
    check_checkpoint(artifact, "default", "abc")
    check_kind(artifact, "onnx")
    before = (folder / MANIFEST).read_text()
    write_artifact(folder, artifact)
    assert (folder / MANIFEST).read_text() == before
    assert artifact.longest_side() == 128
    assert artifact.parts["denoiser"][0].bytes == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "is not usable: JSONDecodeError"),
        ("[]", "does not declare format 1"),
        ('{"format": 2}', "does not declare format 1"),
        ('{"format": 1}', "is not usable: KeyError"),
        ({"colour": "red"}, "unknown entries colour"),
        ({"sizes": [128]}, "is not usable: TypeError"),
        ({"parts": {"denoiser": [{"name": "denoiser.onnx"}]}}, "is not usable: TypeError"),
        (b"\xff\xfe", "is not usable: UnicodeDecodeError"),
    ],
    ids=str,
)
def test_a_manifest_that_is_none_is_refused(folder: Path, change: Any, words: str) -> None:
    path = folder / MANIFEST
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_bytes(change.encode() if isinstance(change, str) else change)
    with pytest.raises(ArtifactError, match=words):
        read_artifact(folder)


def test_a_folder_without_one_was_never_finished(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no exported engine: artifact\.json is missing"):
        read_artifact(tmp_path)


def test_files_that_changed_are_refused(folder: Path) -> None:
    artifact = read_artifact(folder)
    (folder / REPORT).write_text('{"failures": []}')
    with pytest.raises(ArtifactError, match=r"report\.json is missing or was changed"):
        check_files(folder, artifact)
    (folder / "denoiser.onnx").write_bytes(b"grape")
    with pytest.raises(ArtifactError, match="its digest is not the manifest's"):
        check_files(folder, artifact)
    (folder / "denoiser.onnx").write_bytes(b"gra")
    with pytest.raises(ArtifactError, match="has 3 bytes; its manifest promises 5"):
        check_files(folder, artifact)
    (folder / "denoiser.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"denoiser\.onnx is missing"):
        check_files(folder, artifact)


def test_a_file_outside_the_folder_is_none_of_it(folder: Path) -> None:
    artifact = read_artifact(folder)
    fact = replace(artifact.parts["denoiser"][0], name="../denoiser.onnx")
    with pytest.raises(ArtifactError, match="is missing"):
        check_files(folder, replace(artifact, parts={"denoiser": (fact,)}))


def test_what_it_was_not_made_for_is_named(folder: Path) -> None:
    artifact = read_artifact(folder)
    with pytest.raises(ArtifactError, match="exported from default with digest abc, but mine has def"):
        check_checkpoint(artifact, "mine", "def")
    with pytest.raises(ArtifactError, match="of format 'onnx'; serve it with --backend onnx"):
        check_kind(artifact, "pt2")
