"""Checks of what a user can get wrong in a request; each failure is one sentence with the value and what is allowed."""

from __future__ import annotations

import random
import re

from tdm_serve.core import MAX_IMAGES, MAX_SEED, ModelInfo, Request
from tdm_serve.errors import InvalidRequest

MAX_STEPS = 100


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
    if request.steps is not None and not 1 <= request.steps <= MAX_STEPS:
        raise InvalidRequest(f"steps is {request.steps}; it must be between 1 and {MAX_STEPS}", param="steps")
    if request.guidance is not None and not 0.0 <= request.guidance <= 30.0:
        raise InvalidRequest(
            f"guidance is {request.guidance}; it must be between 0 and 30, and 1 turns it off", param="guidance"
        )
    if request.negative_prompt and guidance_of(request, info) == 1.0:
        asked = "of this checkpoint" if request.guidance is None else "of this request"
        raise InvalidRequest(
            f"negative_prompt is {request.negative_prompt!r}, but the guidance {asked} is 1, which is off, so nothing "
            "would read it; leave it empty, or ask for another guidance",
            param="negative_prompt",
        )
