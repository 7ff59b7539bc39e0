"""Previews as files: the quick PNG holds exactly the pixels, in every size, and stays small."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdm_app.encode import encode_preview, quick_png
from tdm_app.schemas import OutputFormat


def opened(file: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    picture.load()  # checks every chunk's sum
    return picture


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_quick_png_is_the_picture(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = opened(quick_png(Image.fromarray(pixels)))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (width, height))
    assert np.array_equal(np.asarray(picture), pixels)


def test_a_smooth_picture_becomes_a_small_file() -> None:
    small = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, format="PNG", compress_level=1)
    assert len(quick_png(smooth)) < 1.5 * len(buffer.getvalue())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_preview_has_the_size_and_the_format_that_were_asked_for(kind: OutputFormat) -> None:
    preview = Image.new("RGB", (8, 8), (200, 30, 30))
    picture = opened(encode_preview(preview, (32, 16), kind, 90))
    assert (str(picture.format).lower(), picture.size) == (kind, (32, 16))
