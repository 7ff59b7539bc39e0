"""A tiny checkpoint, exported to ONNX and served from it: eager's pictures, and a sentence for what does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import checkpoint

from tdm_serve import Pipeline
from tdm_serve.artifact import MANIFEST, read_artifact
from tdm_serve.backends.onnx import pick_provider
from tdm_serve.core import Request
from tdm_serve.errors import ArtifactError, BackendUnavailable, ConfigError, InvalidRequest, PromptTooLong

PROMPTS = ("a star", "two red circles and a blue ring to the left of a yellow star above a green cross")


@pytest.fixture(scope="session")
def served(tiny: Path, engine: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny, backend="onnx", engine=engine)


@pytest.fixture(scope="session")
def eager(tiny: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny)


def pixels(pipeline: Pipeline, requests: list[Request]) -> list[np.ndarray]:
    return [np.asarray(image.image).astype(int) for image in pipeline.generate(requests)]


def test_pictures_are_eagers(served: Pipeline, eager: Pipeline) -> None:
    requests = [Request(p, 7 + i, w, h) for i, p in enumerate(PROMPTS) for w, h in ((128, 128), (64, 96))]
    for ours, theirs in zip(pixels(served, requests), pixels(eager, requests), strict=True):
        assert np.abs(ours - theirs).max() <= 1
    assert served.generate(requests[:1])[0].recipe() == eager.generate(requests[:1])[0].recipe()


def test_pictures_do_not_depend_on_their_company(served: Pipeline) -> None:
    """Five in batches of at most three, texts of two lengths; bit by bit what each is alone."""
    requests = [Request(PROMPTS[i % 2], i, 128, 128) for i in range(5)]
    together, alone = pixels(served, requests), [pixels(served, [request])[0] for request in requests]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_the_report_is_sealed(engine: Path, tiny: Path) -> None:
    artifact = read_artifact(engine)
    report = json.loads((engine / "report.json").read_text())
    assert set(report["parts"]) == set(artifact.parts)
    assert all(0 < row["largest_relative"] <= 1e-4 for row in report["parts"].values())
    assert report["parts"]["denoiser"]["n"] == 2 * 3 * 4 + 2  # sizes x prompts x steps, and a batch of each size
    assert artifact.sigmas == (1.0, 0.9, 0.75, 0.5)
    assert artifact.nfe == 4


@pytest.mark.parametrize(("size", "words"), [((64, 64), ["64x64", "128x128, 64x96"])])
def test_other_sizes_are_refused_with_the_allowed(served: Pipeline, size: tuple[int, int], words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        served("a star", size=size)
    assert all(word in str(refusal.value) for word in words)
    assert refusal.value.param == "size"


def test_a_prompt_beyond_the_text_length_is_refused(served: Pipeline) -> None:
    with pytest.raises(PromptTooLong):
        served("red " * 80)


def test_another_checkpoint_is_refused(engine: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(ArtifactError, match=r"was exported from .* but .*other has"):
        Pipeline.from_pretrained(other, engine=engine)


def test_another_version_is_another_checkpoint(engine: Path, tiny: Path) -> None:
    with pytest.raises(ArtifactError, match="guided has"):
        Pipeline.from_pretrained(f"{tiny}@guided", engine=engine)


def test_half_a_folder_is_refused(tiny: Path, engine: Path, tmp_path: Path) -> None:
    half = shutil.copytree(engine, tmp_path / "half")
    (half / "denoiser.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"denoiser\.onnx is missing"):
        Pipeline.from_pretrained(tiny, engine=half)
    (half / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"no exported engine: artifact\.json is missing"):
        Pipeline.from_pretrained(tiny, engine=half)


def test_a_graph_that_onnx_runtime_cannot_open(tiny: Path, engine: Path, tmp_path: Path) -> None:
    """Its manifest agrees, so the runtime is what finds it."""
    from tdm_serve.artifact import fact_of

    broken = shutil.copytree(engine, tmp_path / "broken")
    (broken / "decoder.onnx").write_bytes(b"no graph")
    document = json.loads((broken / MANIFEST).read_text())
    fact = fact_of(broken / "decoder.onnx")
    document["parts"]["decoder"] = [{"name": fact.name, "bytes": fact.bytes, "sha256": fact.sha256}]
    (broken / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"decoder\.onnx cannot be opened by ONNX Runtime"):
        Pipeline.from_pretrained(tiny, engine=broken)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"backend": "eager"}, ConfigError, "'eager' does not run the exported engine .* choose auto or onnx"),
        ({"dtype": "float16"}, ArtifactError, "computes in float32, and float16 was asked for"),
        ({"backend": "onnx-cuda"}, BackendUnavailable, "does not go with device 'cpu'"),
    ],
)
def test_settings_that_do_not_go_together(
    tiny: Path, engine: Path, settings: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Pipeline.from_pretrained(tiny, engine=engine, **settings)


def test_several_models_are_refused(tiny: Path, engine: Path) -> None:
    with pytest.raises(ConfigError, match="holds one version, and 2 models were named"):
        Pipeline.from_pretrained([tiny, f"{tiny}@guided"], engine=engine)


def test_a_backend_without_an_engine_says_so(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="'onnx' runs an exported engine: name its folder with --engine"):
        Pipeline.from_pretrained(tiny, backend="onnx")


@pytest.mark.parametrize(
    ("backend", "words"), [("onnx-cuda", "CUDAExecutionProvider"), ("onnx-tensorrt", "libnvinfer")]
)
def test_an_absent_provider_says_what_to_install(backend: str, words: str) -> None:
    with pytest.raises(BackendUnavailable, match=words) as refusal:
        pick_provider(backend, torch.device("cuda", 0))
    assert "pip install 'tdm-serve[onnx-gpu]'" in str(refusal.value)


def test_an_unverified_engine_is_served_with_a_warning(
    tiny: Path, engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unsealed = shutil.copytree(engine, tmp_path / "unsealed")
    document = json.loads((unsealed / MANIFEST).read_text())
    (unsealed / MANIFEST).write_text(json.dumps(document | {"report": ""}))
    with caplog.at_level(logging.WARNING, "tdm_serve"):
        Pipeline.from_pretrained(tiny, engine=unsealed)
    assert "without verification" in caplog.text


@pytest.mark.slow
def test_the_command_line_serves_it(
    tiny: Path, engine: Path, tmp_path: Path, cli: Callable[..., object], eager: Pipeline
) -> None:
    from PIL import Image

    answer = cli(
        *("generate", "a star", "--seed", "3", "-o", "a.png", "--model", str(tiny)),
        *("--backend", "onnx", "--engine", str(engine)),
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr  # pyright: ignore[reportAttributeAccessIssue]
    ours = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert np.abs(ours - np.asarray(eager("a star", seed=3)[0].image).astype(int)).max() <= 1
