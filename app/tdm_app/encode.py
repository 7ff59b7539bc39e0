"""Pictures to bytes to base64, off the event loop: compressing a large picture takes longer than most requests wait."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence

from tdm_app.schemas import OutputFormat
from tdm_serve import GeneratedImage


async def encode_all(pictures: Sequence[GeneratedImage], output_format: OutputFormat, quality: int) -> list[str]:
    """Base64 of every picture, in order. `quality` (0..100) is for jpeg and webp."""
    tasks = (asyncio.to_thread(_base64, picture, output_format, quality) for picture in pictures)
    return await asyncio.gather(*tasks)


def encode(picture: GeneratedImage, output_format: OutputFormat, quality: int) -> bytes:
    """One picture as a file. Only png carries the recipe."""
    if output_format == "png":
        return picture.png()
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, format=output_format, quality=quality)
    return buffer.getvalue()


def _base64(picture: GeneratedImage, output_format: OutputFormat, quality: int) -> str:
    return base64.b64encode(encode(picture, output_format, quality)).decode("ascii")
