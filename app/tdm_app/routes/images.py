"""`POST /v1/images/generations`."""

from __future__ import annotations

import time

from fastapi import APIRouter

from tdm_app.encode import encode_all
from tdm_app.schemas import ErrorResponse, ImageData, ImageRequest, ImagesResponse
from tdm_app.service import Service
from tdm_serve import GeneratedImage, ModelInfo
from tdm_serve.core import Request
from tdm_serve.validation import parse_size, seeds_for


def images_router(service: Service) -> APIRouter:
    """Text to pictures in OpenAI's shape."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post("/generations", responses={"default": {"model": ErrorResponse}})
    async def generate(body: ImageRequest) -> ImagesResponse:  # pyright: ignore[reportUnusedFunction]
        """Draws `n` pictures. `seed`, `num_inference_steps` and per picture `seed`, `nfe` and `ms` are additions."""
        service.must_be(body.model)
        pictures = await service.generate(requests_for(body, service.info))
        encoded = await encode_all(pictures, body.output_format, body.output_compression)
        return ImagesResponse(
            created=int(time.time()),
            data=[_data(picture, text) for picture, text in zip(pictures, encoded, strict=True)],
            output_format=body.output_format,
            size=f"{pictures[0].width}x{pictures[0].height}",
            quality=body.echoed_quality,
            model=service.info.id,
        )

    return router


def requests_for(body: ImageRequest, info: ModelInfo) -> list[Request]:
    """One engine request per picture. Raises InvalidRequest for `size`, `n` and `seed`."""
    width, height = (info.width, info.height) if body.size == "auto" else parse_size(body.size)
    seeds = seeds_for(body.seed, body.n)
    return [Request(body.prompt, seed, width, height, steps=body.num_inference_steps) for seed in seeds]


def _data(picture: GeneratedImage, text: str) -> ImageData:
    ms = {stage: round(value, 3) for stage, value in picture.timings_ms.items()}
    return ImageData(b64_json=text, seed=picture.seed, nfe=picture.nfe, ms=ms)
