"""Checks of what a user can get wrong in a request; each failure is one sentence with the value and what is allowed."""

from __future__ import annotations

import random
import re

from tdm_serve.core import MAX_IMAGES, MAX_SEED, ModelInfo, Request
from tdm_serve.errors import InvalidRequest

MAX_STEPS = 100
MAX_GUIDANCE = 30.0  # outside, in any family's convention; a weight inside may be one more
MAX_ADAPTER_SCALE = 10.0


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels from `WIDTHxHEIGHT`."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if found is None:
        raise InvalidRequest(f"size {text!r} is not of the form WIDTHxHEIGHT, such as 128x128", param="size")
    return int(found[1]), int(found[2])


def check_count(n: int) -> None:
    """Raises InvalidRequest unless `n` pictures may be asked for at once."""
    if not 1 <= n <= MAX_IMAGES:
        raise InvalidRequest(f"n is {n}; it must be between 1 and {MAX_IMAGES}", param="n")


def seeds_for(seed: int | None, n: int, prompts: int = 1) -> list[int]:
    """Consecutive seeds for `n` pictures of each of `prompts` prompts, from `seed` or, where it is None, at random."""
    check_count(n)
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    pictures = n * prompts
    if not 0 <= seed <= MAX_SEED - (pictures - 1):
        largest = MAX_SEED - (pictures - 1)
        raise InvalidRequest(
            f"seed is {seed}; for {pictures} pictures it must be between 0 and {largest}", param="seed"
        )
    return list(range(seed, seed + pictures))


def guidance_of(request: Request, info: ModelInfo) -> float:
    """The weight that a request is made with; 1 is off."""
    return info.guidance if request.guidance is None else request.guidance


def weight_of(guidance_scale: float, off: float) -> float:
    """The weight w inside, of a guidance scale in the convention of a family's users, who call no guidance `off`.

    Everything up to `off` is no guidance, as in the stock pipelines. Raises InvalidRequest for what is out of range.
    """
    if not 0.0 <= guidance_scale <= MAX_GUIDANCE:
        raise InvalidRequest(
            f"guidance_scale is {guidance_scale:g}; it must be between 0 and {MAX_GUIDANCE:g}; {off:g} turns it off",
            param="guidance",
        )
    return max(1.0, guidance_scale - off + 1.0)


def scale_of(weight: float, off: float) -> float:
    """A weight w in the convention of a family's users: what `weight_of` makes it of."""
    return round(weight - 1.0 + off, 9)


def is_untrained(request: Request, info: ModelInfo) -> bool:
    """Whether a request's number of steps is one that its version was not trained for."""
    return request.steps not in (None, len(info.sigmas)) and not info.free_steps


def check_request(request: Request, info: ModelInfo) -> None:
    """Everything but the prompt's token count, which only the tokenizer knows."""
    if not request.prompt.strip():
        raise InvalidRequest("the prompt is empty; it must hold at least one visible character", param="prompt")
    if not 0 <= request.seed <= MAX_SEED:
        raise InvalidRequest(f"seed is {request.seed}; it must be between 0 and {MAX_SEED}", param="seed")
    for side, name in ((request.width, "width"), (request.height, "height")):
        if side % info.size_multiple or not info.min_side <= side <= info.max_side:
            raise InvalidRequest(
                f"size {request.width}x{request.height} has a {name} of {side}; it must be a multiple of "
                f"{info.size_multiple} between {info.min_side} and {info.max_side}",
                param="size",
            )
    if info.sizes and (request.width, request.height) not in info.sizes:
        allowed = ", ".join(f"{width}x{height}" for width, height in info.sizes)
        raise InvalidRequest(
            f"size {request.width}x{request.height} is not in this exported engine; its sizes are {allowed}",
            param="size",
        )
    _check_steps(request, info)
    _check_guidance(request, info)
    _check_adapter_scale(request.adapter_scale, info)


def _check_steps(request: Request, info: ModelInfo) -> None:
    if request.steps is not None and not 1 <= request.steps <= MAX_STEPS:
        raise InvalidRequest(f"steps is {request.steps}; it must be between 1 and {MAX_STEPS}", param="steps")
    if is_untrained(request, info) and not request.allow_untrained_schedule:
        raise InvalidRequest(
            f"steps is {request.steps}, but {info.id} was trained for {len(info.sigmas)}; leave it out, or set "
            "allow_untrained_schedule (--allow-untrained-schedule) to have pictures that it was not trained to make",
            param="steps",
        )


def _check_guidance(request: Request, info: ModelInfo) -> None:
    if request.guidance is not None and not 0.0 <= request.guidance <= MAX_GUIDANCE + 1:
        raise InvalidRequest(
            f"guidance is {request.guidance}; a weight must be between 0 and {MAX_GUIDANCE + 1:g}, and 1 turns it off",
            param="guidance",
        )
    if request.negative_prompt and guidance_of(request, info) == 1.0:
        off = f"{info.id} has no guidance by itself" if request.guidance is None else "guidance is turned off"
        raise InvalidRequest(
            f"negative_prompt is {request.negative_prompt!r}, but {off}, so nothing would read it; leave it empty, or "
            "ask for guidance",
            param="negative_prompt",
        )


def _check_adapter_scale(scale: float | None, info: ModelInfo) -> None:
    if scale is None:
        return
    if info.adapter != "separate":
        why = "has no adapter" if info.adapter == "none" else "has its adapter in its weights"
        remedy = "" if info.adapter == "none" else ', or load the model with adapters "separate" (--adapters separate)'
        raise InvalidRequest(f"adapter_scale is {scale:g}, but {info.id} {why}; leave it out{remedy}", "adapter_scale")
    if not 0.0 <= scale <= MAX_ADAPTER_SCALE:
        raise InvalidRequest(
            f"adapter_scale is {scale:g}; it must be between 0, the base, and {MAX_ADAPTER_SCALE:g}", "adapter_scale"
        )
