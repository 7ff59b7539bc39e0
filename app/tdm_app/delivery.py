"""From the engine's pictures to the API's words: files, links, ids and the count of work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tdm_app.encode import encode, text_of
from tdm_app.job_table import new_id
from tdm_app.schemas import ImageData, ImagesResponse, PictureRequest, TokenDetails, Usage
from tdm_app.service import Service
from tdm_serve import GeneratedImage
from tdm_serve.errors import OutputError


@dataclass(frozen=True, slots=True)
class Kept:
    """Pictures as a job leaves them: the answer without them, their files in the store, their recipes by image id."""

    answer: ImagesResponse
    files: tuple[str, ...]
    recipes: dict[str, dict[str, Any]]


async def respond(
    service: Service, body: PictureRequest, pictures: Sequence[GeneratedImage], *, owner: str, base_url: str
) -> ImagesResponse:
    """The answer with all pictures, compressed off the event loop. `owner` is who may rate them."""
    answer = _answer(service, body, pictures)
    if body.response_format == "url":
        lifetime_s = service.settings.url_lifetime_s
        for data, file_id in zip(answer.data, await _stored(service, body, pictures, lifetime_s), strict=True):
            data.url = base_url + service.store.link(file_id, lifetime_s)
    else:
        made = (asyncio.to_thread(_text, body, picture) for picture in pictures)
        for data, text in zip(answer.data, await asyncio.gather(*made), strict=True):
            data.b64_json = text
    await service.feedback.remember(_recipes(answer, pictures), owner)
    return answer


async def keep(service: Service, body: PictureRequest, pictures: Sequence[GeneratedImage]) -> Kept:
    """Puts the pictures of a job into the store, where they stay as long as the job."""
    answer = _answer(service, body, pictures)
    files = await _stored(service, body, pictures, service.settings.job_retention_s)
    return Kept(answer, tuple(files), _recipes(answer, pictures) if service.feedback.on else {})


async def fetch(
    service: Service, answer: ImagesResponse, files: Sequence[str], *, as_links: bool, base_url: str
) -> ImagesResponse:
    """A kept answer with its pictures again. One that newer pictures have pushed out of the store stays without."""
    for data, file_id in zip(answer.data, files, strict=True):
        if as_links:
            data.url = base_url + service.store.link(file_id, service.settings.url_lifetime_s)
        elif (file := await service.store.get(file_id)) is not None:
            data.b64_json = await asyncio.to_thread(text_of, file)
    return answer


async def _stored(
    service: Service, body: PictureRequest, pictures: Sequence[GeneratedImage], keep_s: float
) -> list[str]:
    """Ids of the pictures' files. On an error none of them stays."""
    files: list[str] = []
    try:
        for picture in pictures:
            data = await asyncio.to_thread(encode, picture, body.output_format, body.output_compression)
            files.append(await service.store.put(data, body.output_format, keep_s))
    except OutputError:
        await service.store.remove(files)
        raise
    return files


def _text(body: PictureRequest, picture: GeneratedImage) -> str:
    return text_of(encode(picture, body.output_format, body.output_compression))


def _answer(service: Service, body: PictureRequest, pictures: Sequence[GeneratedImage]) -> ImagesResponse:
    first = pictures[0]
    return ImagesResponse(
        created=int(time.time()),
        data=[_data(picture) for picture in pictures],
        output_format=body.output_format,
        size=f"{first.width}x{first.height}",
        quality=body.echoed_quality,
        usage=usage_of(service, pictures),
        model=first.model,
    )


def _data(picture: GeneratedImage) -> ImageData:
    ms = {stage: round(value, 3) for stage, value in picture.timings_ms.items()}
    return ImageData(
        image_id=new_id("img"),
        seed=picture.seed,
        nfe=picture.nfe,
        ms=ms,
        untrained_schedule=picture.untrained_schedule,
        truncated=picture.truncated,
        adapter_scale=picture.adapter_scale,
    )


def _recipes(answer: ImagesResponse, pictures: Sequence[GeneratedImage]) -> dict[str, dict[str, Any]]:
    return {data.image_id: picture.recipe() for data, picture in zip(answer.data, pictures, strict=True)}


def usage_of(service: Service, pictures: Sequence[GeneratedImage]) -> Usage:
    """The prompt counts once, however many pictures were made of it."""
    text = pictures[0].tokens
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
