"""Cheap looks at latents: the map that is fitted, what it costs, and where it comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_serve import Pipeline, Request
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.inspect import checkpoint_hash, weight_files
from tdm_serve.models.spec import MANIFEST
from tdm_serve.preview import fit, picture


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The embedded checkpoint without a map."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "checkpoint"))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["preview"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square, in 8-bit values."""
    return float(np.sqrt(np.square(np.asarray(one).astype(float) - np.asarray(other)).mean()))


def test_a_linear_map_is_found_again() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = ((3.0, -2.0, 1.0), (0.5, 4.0, -1.0), (120.0, 90.0, 140.0))
    latents = torch.randn(4, 2, 8, 8, generator=random)
    weights = torch.tensor(matrix)
    cells = torch.einsum("bchw,cd->bdhw", latents, weights[:-1]) + weights[-1].view(1, 3, 1, 1)
    found = fit(latents, cells.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert np.allclose(found, matrix, atol=2e-3)
    shown = np.asarray(picture(latents[:1], found, 1)).astype(float)
    assert np.abs(shown - cells[0].permute(1, 2, 0).clamp(0, 255).numpy()).max() <= 0.6


def test_the_last_preview_looks_like_the_picture(pipeline: Pipeline) -> None:
    engine = pipeline.engine
    [sample] = engine.start([Request("two red circles", 1, 128, 128)])
    while not sample.done:
        engine.step([sample])
    [image] = engine.finish([sample])
    shown = engine.preview(sample.clean)
    grey = Image.new("RGB", image.image.size, tuple(int(x) for x in np.asarray(image.image).mean((0, 1))))
    assert shown.size == image.image.size
    assert distance(shown, image.image) < 0.8 * distance(grey, image.image)


def engine_request(pipeline: Pipeline, prompt: str):
    from tdm_serve.core import Request

    return Request(prompt, 1, pipeline.info.width, pipeline.info.height)


def test_latents_that_are_no_numbers_have_a_preview(pipeline: Pipeline) -> None:
    assert pipeline.engine.preview(torch.full((1, 4, 8, 10), torch.nan)).size == (80, 64)


def test_a_checkpoint_without_a_map_gets_one_and_keeps_its_hash(bare: Path, pipeline: Pipeline) -> None:
    spec = resolve(bare)
    assert spec.preview is None
    assert checkpoint_hash(spec, weight_files(spec)) == pipeline.info.checkpoint_hash
    fitted = Engine.load(bare).model.preview
    assert len(fitted) == 5
    latents = pipeline.engine.model.noise(1, 64, 64)
    assert distance(picture(latents, fitted, 8), pipeline.engine.preview(latents)) < 60


@pytest.mark.parametrize("matrix", [[[1, 2]], [["a", 2, 3]], [[float("nan"), 0, 0]], 5])
def test_a_map_of_the_wrong_shape_is_refused(bare: Path, matrix: object) -> None:
    manifest = json.loads((bare / MANIFEST).read_text())
    (bare / MANIFEST).write_text(json.dumps(manifest | {"preview": {"matrix": matrix}}))
    with pytest.raises(CheckpointError, match="not usable"):
        resolve(bare)
