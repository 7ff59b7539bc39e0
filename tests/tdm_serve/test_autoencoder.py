"""Tiles: nothing changes up to the threshold, and above it borders do not show."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tdm_serve import Pipeline
from tdm_serve.core import Request
from tdm_serve.models.autoencoder import TILE_PX, decode, tile

SIDE = 256
STEP = 0.75 * SIDE / 2  # tiles of half the side overlap by a quarter


@pytest.fixture(scope="module")
def latents(pipeline: Pipeline) -> Tensor:
    """Raw latents (1, 4, 32, 32) of a real picture of 256 pixels."""
    engine, model = pipeline.engine, pipeline.engine.model
    [sample] = engine.start([Request("two red circles", 3, SIDE, SIDE)])
    while not sample.done:
        engine.step([sample])
    return sample.latents / model.scale + model.shift


def decoded(vae: AutoencoderKL, latents: Tensor, tile_px: int | None) -> Tensor:
    """(3, H, W) in 8-bit steps; whole where there are no tiles."""
    one = copy.deepcopy(vae)
    if tile_px is None:
        one.disable_tiling()
    else:
        tile(one, tile_px)
    with torch.inference_mode():
        return (decode(one, latents)[0] * 127.5 + 127.5).clamp(0, 255)


def test_up_to_the_threshold_nothing_changes(pipeline: Pipeline, latents: Tensor) -> None:
    vae = pipeline.engine.model.vae
    assert vae.use_tiling and vae.tile_sample_min_size == TILE_PX == 1024
    whole = decoded(vae, latents, None)
    assert torch.equal(whole, decoded(vae, latents, TILE_PX)) and torch.equal(whole, decoded(vae, latents, SIDE))


def test_tiles_change_little_and_leave_no_seams(pipeline: Pipeline, latents: Tensor) -> None:
    """Where tiles begin, neighbouring pixels differ no more than the whole picture's do, to a few 8-bit steps."""
    vae = pipeline.engine.model.vae
    whole, tiled = decoded(vae, latents, None), decoded(vae, latents, SIDE // 2)
    difference = (tiled - whole).abs()
    assert 0 < float(difference.mean()) < 2
    jumps = ((tiled.diff(dim=-1) - whole.diff(dim=-1)).abs()).mean(dim=(0, 1))  # (W - 1,)
    seams = [round(STEP * index) - 1 for index in (1, 2)]
    assert float(jumps[seams].max()) < 2 * float(jumps.mean()) + 0.5


def test_tiles_bound_the_largest_convolution(pipeline: Pipeline, latents: Tensor) -> None:
    """What memory follows: no layer sees more than a tile."""
    seen: list[int] = []
    vae = copy.deepcopy(pipeline.engine.model.vae)
    convolution = next(one for one in reversed(list(vae.decoder.modules())) if isinstance(one, nn.Conv2d))
    convolution.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    for tile_px in (SIDE, SIDE // 2):
        tile(vae, tile_px)
        with torch.inference_mode():
            decode(vae, latents)
    assert seen[0] == SIDE and len(seen) > 4 and max(seen[1:]) == SIDE // 2


def test_layouts_agree(pipeline: Pipeline, latents: Tensor) -> None:
    vae = copy.deepcopy(pipeline.engine.model.vae)
    weight = vae.get_parameter("decoder.conv_in.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    last = decoded(vae, latents, None)
    nn.Module.to(vae, memory_format=torch.contiguous_format)
    assert torch.allclose(last, decoded(vae, latents, None), atol=0.05)
