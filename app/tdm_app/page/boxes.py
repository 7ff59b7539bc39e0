"""What the boxes of the page offer, and what they say as engine requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tdm_app.settings import Settings
from tdm_serve.core import ModelInfo, Request
from tdm_serve.errors import InvalidRequest
from tdm_serve.validation import parse_size, seeds_for

MAX_ON_PAGE = 4
EXAMPLES = ("two red circles", "a blue ring left of a star", 'the word "CAT" in red', "four green triangles")
SHAPES = (("Square", 1, 1), ("Landscape", 3, 2), ("Portrait", 2, 3), ("Wide", 16, 9), ("Tall", 9, 16))


def requests_of(prompt: str, seed: str, size: str, count: int, model: str = "") -> list[Request]:
    """One request per picture, with consecutive seeds. Raises InvalidRequest."""
    if count not in range(1, MAX_ON_PAGE + 1):  # other numbers come from no button of ours
        raise InvalidRequest(f"the number of pictures is {count}; allowed here: 1 to {MAX_ON_PAGE}", param="n")
    width, height = parse_size(size)
    return [Request(prompt, one, width, height, model=model) for one in seeds_for(seed_of(seed), count)]


def versus(prompt: str, seed: str, size: str, models: Sequence[str]) -> list[Request]:
    """One request per model, all with one seed. Raises InvalidRequest."""
    if len(set(models)) < len(models):
        raise InvalidRequest(f"both sides are {models[0]!r}; choose two different checkpoints", param="model")
    width, height = parse_size(size)
    (one,) = seeds_for(seed_of(seed), 1)
    return [Request(prompt, one, width, height, model=model) for model in models]


def check_limits(requests: Sequence[Request], settings: Settings) -> None:
    """Raises InvalidRequest for what is outside this server's own limits, which are narrower than the model's."""
    for request in requests:
        if len(request.prompt) > settings.max_prompt_chars:
            count = f"the prompt has {len(request.prompt)} characters"
            raise InvalidRequest(f"{count}; allowed here: at most {settings.max_prompt_chars}", "prompt")
        pixels = request.width * request.height
        if settings.max_pixels is not None and pixels > settings.max_pixels:
            size = f"size {request.width}x{request.height} has {pixels} pixels"
            raise InvalidRequest(f"{size}; allowed here: at most {settings.max_pixels}", "size")


def seed_of(text: str) -> int | None:
    """The number in the seed box; None for an empty one, which asks for any seed. Raises InvalidRequest."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest(f"seed is {text!r}; allowed: a whole number, or nothing", param="seed") from None


def size_choices(info: ModelInfo) -> list[tuple[str, str]]:
    """(name, size): the model's own size first, then other shapes of about the same area that it takes."""
    own = (info.width, info.height)
    names = {own: "Square" if info.width == info.height else "Native"}
    area = info.width * info.height
    for name, across, down in SHAPES:
        unit = (area / (across * down)) ** 0.5 / info.size_multiple
        shape = (round(across * unit) * info.size_multiple, round(down * unit) * info.size_multiple)
        if all(info.min_side <= side <= info.max_side for side in shape):
            names.setdefault(shape, name)
    return [(f"{name} · {width} by {height}", f"{width}x{height}") for (width, height), name in names.items()]


def model_choices(infos: Iterable[ModelInfo]) -> list[tuple[str, str]]:
    """(name with its cost, id) of every served checkpoint."""
    return [(f"{info.id} · {info.nfe} evaluations", info.id) for info in infos]
