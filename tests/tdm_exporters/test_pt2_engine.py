"""The same checkpoint as a compiled package: loaded in seconds, eager's pictures, bound to machine and torch."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tdm_exporters.export import export
from tdm_exporters.options import Options
from tdm_serve import Pipeline
from tdm_serve.artifact import MANIFEST
from tdm_serve.core import Request
from tdm_serve.errors import ArtifactError, BackendUnavailable

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "pt2"
    report = export(Options(str(tiny), "pt2", folder, sizes=((128, 128), (64, 96)), batch=(1, 3)))
    assert report is not None
    assert report.failures == ()
    return folder


def test_it_makes_eagers_pictures_and_compiles_nothing(
    tiny: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no compiler
    started = time.perf_counter()
    ours = Pipeline.from_pretrained(tiny, backend="pt2", engine=package)
    assert time.perf_counter() - started < 5
    requests = [Request("two red circles", seed, w, h) for seed in range(5) for w, h in ((128, 128), (64, 96))]
    together, theirs = ours.generate(requests), Pipeline.from_pretrained(tiny).generate(requests)
    for one, other in zip(together, theirs, strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image).astype(int)).max() <= 1
    alone = ours.generate(requests[2:3])[0]
    assert np.array_equal(np.asarray(alone.image), np.asarray(together[2].image))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"machine": "another processor"}, "compiled for the processor another processor"),
        ({"versions": {"torch": "1.0"}}, "compiled for the torch 1.0"),
        ({"kind": "onnx"}, "serve it with --backend onnx"),
    ],
    ids=str,
)
def test_what_was_compiled_for_something_else_is_refused(
    tiny: Path, package: Path, tmp_path: Path, entry: dict[str, object], words: str
) -> None:
    changed = shutil.copytree(package, tmp_path / "changed")
    document = json.loads((changed / MANIFEST).read_text())
    (changed / MANIFEST).write_text(json.dumps(document | entry))
    with pytest.raises(ArtifactError, match=words):
        Pipeline.from_pretrained(tiny, backend="pt2", engine=changed)


def test_exporting_needs_a_compiler(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendUnavailable, match=r"none of g\+\+, c\+\+, clang\+\+ is on the PATH"):
        export(Options(str(tiny), "pt2", tmp_path / "out"))
