"""SD3 and SD3.5 as engines: each text encoder a graph, eager's pictures, and a sentence for what changes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdm_exporters.export import export
from tdm_exporters.options import Options
from tdm_serve import Pipeline
from tdm_serve.artifact import read_artifact
from tdm_serve.core import Request
from tdm_serve.errors import InvalidRequest
from tdm_serve.models.spec import ModelSpec
from tests.tdm_serve.family_cases import CASES, spec_of

CLIPS = {"text_encoder", "text_encoder_2"}
OTHERS = {"modulation", "refiner", "denoiser", "decoder"}
SIZES = ((64, 64), (96, 48))


def made(name: str, kind: str, folder: Path) -> tuple[ModelSpec, Path]:
    """A tiny checkpoint and its verified engine."""
    spec = spec_of(CASES[name], CASES[name].make(folder / "checkpoint"))
    report = export(Options(spec, kind, folder / "engine", sizes=SIZES, batch=(1, 2)))
    assert report is not None
    assert report.failures == ()
    return spec, folder / "engine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "encoders"),
    [
        ("sd35-dpm", "onnx", CLIPS | {"text_encoder_3"}),
        ("sd3-without-t5", "onnx", CLIPS),
        ("sd35-dpm", "pt2", CLIPS | {"text_encoder_3"}),
    ],
)
def test_pictures_are_eagers(tmp_path: Path, name: str, kind: str, encoders: set[str]) -> None:
    """Guided and not, in batches larger than the engine's, at every size."""
    spec, engine = made(name, kind, tmp_path)
    assert set(read_artifact(engine).parts) == encoders | OTHERS
    report = json.loads((engine / "report.json").read_text())
    assert all(row["largest_relative"] <= 1e-4 for row in report["parts"].values())
    requests = [Request("a red star", seed, *size) for seed in range(3) for size in SIZES]
    requests.append(Request("b", 9, 64, 64, guidance=3.5, negative_prompt="4 bs"))
    ours, eager = Pipeline.from_pretrained(spec, engine=engine), Pipeline.from_pretrained(spec)
    for one, other in zip(ours.generate(requests), eager.generate(requests), strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image).astype(int)).max() <= 1
        assert one.nfe == other.nfe
    with pytest.raises(InvalidRequest, match="64x64, 96x48"):
        ours("a red star", size=(64, 48))


def test_another_text_length_is_refused(tmp_path: Path) -> None:
    """The padding behind a prompt is attended."""
    spec = spec_of(CASES["sd3-without-t5"], CASES["sd3-without-t5"].make(tmp_path / "checkpoint"))
    with pytest.raises(InvalidRequest, match="attends to the padding behind a prompt"):
        export(Options(spec, "onnx", tmp_path / "engine", text=16))
