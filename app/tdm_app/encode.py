"""Pictures to files to base64. To be called off the event loop: compressing takes longer than most requests wait."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from tdm_app.schemas import OutputFormat
from tdm_serve import GeneratedImage

if TYPE_CHECKING:
    from PIL import Image

FAST = 1  # zlib's level for pictures that are looked at for a moment


def encode(picture: GeneratedImage, output_format: OutputFormat, quality: int) -> bytes:
    """A finished picture as a file. `quality` (0..100) is for jpeg and webp. Only png carries the recipe."""
    return picture.png() if output_format == "png" else _compressed(picture.image, output_format, quality)


def encode_preview(image: Image.Image, size: tuple[int, int], output_format: OutputFormat, quality: int) -> bytes:
    """A predicted picture as a file of the final size (width, height)."""
    from PIL import Image

    full = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    if output_format != "png":
        return _compressed(full, output_format, quality)
    buffer = io.BytesIO()
    full.save(buffer, format="PNG", compress_level=FAST)
    return buffer.getvalue()


def text_of(file: bytes) -> str:
    """Base64 of a file."""
    return base64.b64encode(file).decode("ascii")


def _compressed(image: Image.Image, output_format: OutputFormat, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=output_format, quality=quality)
    return buffer.getvalue()
