"""From the engine's pictures to the API's words: files, addresses, ids and the count of work."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from tdm_app.encode import encode, text_of
from tdm_app.schemas import ImageData, ImagesResponse, PictureRequest, TokenDetails, Usage
from tdm_app.service import Service
from tdm_serve import GeneratedImage


async def respond(service: Service, body: PictureRequest, pictures: Sequence[GeneratedImage]) -> ImagesResponse:
    """The answer with all pictures, compressed off the event loop."""
    data = await asyncio.gather(*(asyncio.to_thread(_deliver, body, picture) for picture in pictures))
    first = pictures[0]
    return ImagesResponse(
        created=int(time.time()),
        data=list(data),
        output_format=body.output_format,
        size=f"{first.width}x{first.height}",
        quality=body.echoed_quality,
        usage=usage_of(service, pictures),
        model=first.model,
    )


def _deliver(body: PictureRequest, picture: GeneratedImage) -> ImageData:
    file = encode(picture, body.output_format, body.output_compression)
    return ImageData(
        b64_json=text_of(file),
        image_id=new_image_id(),
        seed=picture.seed,
        nfe=picture.nfe,
        ms=milliseconds(picture),
    )


def usage_of(service: Service, pictures: Sequence[GeneratedImage]) -> Usage:
    """The prompt counts once, however many pictures were made of it."""
    text = 0
    blocks = sum(_blocks(service, picture) for picture in pictures)
    return Usage(
        total_tokens=text + blocks,
        input_tokens=text,
        output_tokens=blocks,
        input_tokens_details=TokenDetails(text_tokens=text),
    )


def _blocks(service: Service, picture: GeneratedImage) -> int:
    side = service.infos[picture.model].size_multiple
    return (picture.width // side) * (picture.height // side)


def milliseconds(picture: GeneratedImage) -> dict[str, float]:
    """Its stages, to a microsecond."""
    return {stage: round(value, 3) for stage, value in picture.timings_ms.items()}


def new_image_id() -> str:
    return f"img_{uuid.uuid4().hex}"
