"""The out-of-domain monitor: what true pictures have, what damage does to each number, and hand-computed cases."""

from __future__ import annotations

import io
import random
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tdm_finetune import scenes
from tdm_finetune.data import examples
from tdm_finetune.monitor import SCENES, compressibility, diversity, health, palette_error

Pictures = NDArray[np.uint8]


@pytest.fixture(scope="module")
def true() -> Pictures:
    """Four renders of every category."""
    return np.stack([picture for _, picture in islice(examples(seed=1), 28)])


def noisy(pictures: Pictures, deviation: float) -> Pictures:
    noise = np.random.default_rng(0).normal(0, deviation * 255, pictures.shape)
    return (pictures + noise).clip(0, 255).astype(np.uint8)


def blurred(pictures: Pictures, sigma: float) -> Pictures:
    return ndimage.gaussian_filter(pictures.astype(np.float32), (0, sigma, sigma, 0)).astype(np.uint8)


def test_true_pictures_are_clean_but_for_their_edges(true: Pictures) -> None:
    assert palette_error(true) == pytest.approx(7e-4, rel=0.35)


def test_palette_colours_alone_have_no_error() -> None:
    rows = np.array([SCENES], dtype=np.uint8).repeat(8, axis=0)[None]  # (1, 8, colours, 3)
    assert palette_error(rows) == pytest.approx(0.0, abs=1e-6)


def test_palette_error_is_the_mean_squared_distance_to_the_nearest() -> None:
    """Half the pixels are 51 levels (0.2) off in one channel, a quarter 51 off in all three."""
    picture = np.array([[[0, 0, 0], [51, 0, 0], [51, 0, 0], [204, 204, 204]]], dtype=np.uint8)[None]
    assert palette_error(picture, [(0, 0, 0), (255, 255, 255)]) == pytest.approx((2 * 0.04 + 3 * 0.04) / 4, rel=1e-5)


def test_blur_drift_and_noise_raise_the_palette_error(true: Pictures) -> None:
    clean = palette_error(true)
    assert palette_error(noisy(true, 0.05)) - clean == pytest.approx(3 * 0.05**2, rel=0.25)
    assert palette_error(blurred(true, 2.0)) > 3 * clean
    assert palette_error((true * 0.8).astype(np.uint8)) > 3 * clean


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    """Two prompts; 0, 51 and 102 levels are 0.2, 0.2 and 0.4 apart. The second prompt's seeds are all alike."""
    first = np.stack([np.full((4, 4, 3), level, dtype=np.uint8) for level in (0, 51, 102)])
    second = np.full_like(first, 200)
    assert diversity(np.stack([first])) == pytest.approx((0.2 + 0.2 + 0.4) / 3, rel=1e-6)
    assert diversity(np.stack([first, second])) == pytest.approx((0.2 + 0.2 + 0.4) / 6, rel=1e-6)
    assert diversity(np.stack([second])) == 0.0


def test_diversity_of_true_pictures_is_lost_in_collapse() -> None:
    rng = random.Random(0)
    specs = [prompt.spec for prompt in islice(scenes.prompts("val"), 7)]
    groups = np.stack([[scenes.render(spec, rng) for _ in range(4)] for spec in specs])
    assert 0.15 < diversity(groups) < 0.25
    assert diversity(np.concatenate([groups[:, :1]] * 3, axis=1)) == 0.0


def test_compressibility_is_the_size_of_a_jpeg(true: Pictures) -> None:
    file = io.BytesIO()
    Image.fromarray(true[0]).save(file, "JPEG", quality=95)
    assert compressibility(true[:1]) == len(file.getvalue()) / 1000
    assert compressibility(noisy(true, 0.05)) > 2 * compressibility(true) > 4 * compressibility(np.zeros_like(true))


def test_health_of_tensors_and_of_groups(true: Pictures) -> None:
    found = health(torch.from_numpy(true))
    assert found == {"palette_error": palette_error(true), "compressibility": compressibility(true)}
    grouped = health(true, seeds=4)
    assert grouped.keys() == found.keys() | {"diversity"}
    assert grouped["diversity"] == diversity(true.reshape(7, 4, 128, 128, 3))


def test_another_world_brings_its_own_palette_and_size() -> None:
    micro = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    micro[:, :4, :4] = (10, 200, 10)
    assert health(micro, palette=[(0, 0, 0), (10, 200, 10)])["palette_error"] == pytest.approx(0.0, abs=1e-6)
    assert health(micro)["palette_error"] > 0.01


@pytest.mark.parametrize("shape", [(128, 128, 3), (0, 8, 8, 3), (1, 8, 8, 4)])
def test_what_is_no_batch_of_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        palette_error(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="2 seeds or more"):
        diversity(np.zeros(shape, dtype=np.uint8))


def test_wrong_types_and_groups(true: Pictures) -> None:
    with pytest.raises(ValueError, match="float32"):
        health(true.astype(np.float32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="28 pictures are no whole groups of 5"):
        health(true, seeds=5)
