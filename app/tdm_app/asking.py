"""From the API's words to the engine's: what a body asks for, on whose behalf and on what terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdm_app.auth import Caller
from tdm_app.schemas import PictureRequest
from tdm_app.settings import Settings
from tdm_serve import ModelInfo
from tdm_serve.core import Request, Terms
from tdm_serve.errors import InvalidRequest, UnknownModel
from tdm_serve.validation import parse_size, seeds_for, weight_of


@dataclass(frozen=True, slots=True)
class Asked:
    """One body, understood. `requests` has one entry per picture, all of one size."""

    requests: tuple[Request, ...]
    terms: Terms
    model: ModelInfo

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.requests[0].width, self.requests[0].height


def understand(body: PictureRequest, infos: Mapping[str, ModelInfo], settings: Settings, tenant: str) -> Asked:
    """One engine request per picture, for the first model where the body names none.

    Raises UnknownModel, and InvalidRequest for what is outside this server's limits.
    """
    model = chosen(infos, body.model)
    if body.n > settings.max_images:
        raise InvalidRequest(f"n is {body.n}; it must be between 1 and {settings.max_images}", param="n")
    if len(body.prompt) > settings.max_prompt_chars:
        raise InvalidRequest(
            f"the prompt has {len(body.prompt)} characters; allowed here: at most {settings.max_prompt_chars}", "prompt"
        )
    width, height = (model.width, model.height) if body.size == "auto" else parse_size(body.size)
    if settings.max_pixels is not None and width * height > settings.max_pixels:
        raise InvalidRequest(
            f"size {width}x{height} has {width * height} pixels; allowed here: at most {settings.max_pixels}", "size"
        )
    requests = [
        Request(
            body.prompt,
            seed,
            width,
            height,
            steps=body.num_inference_steps,
            guidance=None if body.guidance_scale is None else weight_of(body.guidance_scale, model.guidance_off),
            negative_prompt=body.negative_prompt or "",
            model=model.id,
            allow_untrained_schedule=body.allow_untrained_schedule,
            truncate_prompt=body.truncate_prompt,
            adapter_scale=body.adapter_scale,
        )
        for seed in seeds_for(body.seed, body.n)
    ]
    return Asked(tuple(requests), Terms(body.deadline_ms, body.priority, tenant), model)


def chosen(infos: Mapping[str, ModelInfo], name: str | None) -> ModelInfo:
    """A served model; None means the default. Raises UnknownModel."""
    if name is None:
        return next(iter(infos.values()))
    if name not in infos:
        raise UnknownModel(f"model {name[:100]!r} is not served; allowed: {', '.join(map(repr, infos))}")
    return infos[name]


def tenant_of(caller: Caller, user: str | None) -> str:
    """Whose share of the device a request takes: an API key's; without keys, what the client calls its user."""
    return f"key:{caller.id}" if caller.id else f"user:{user}" if user else ""


def facts_of(body: PictureRequest, asked: Asked, settings: Settings) -> dict[str, Any]:
    """What the log says about a request. The prompt only where the operator wants it."""
    width, height = asked.size
    facts = {"model": asked.model.id, "n": body.n, "size": f"{width}x{height}"}
    return {**facts, "prompt": body.prompt} if settings.log_prompts else facts
