"""The shared nouns: what is asked, what comes back, what a model can do. Light on purpose; no torch here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

RECIPE_KEY = "tdm-serve"  # PNG text chunk with the whole recipe as JSON
MAX_SEED = 2**63 - 1
MAX_IMAGES = 10  # per request, as in OpenAI's API
MIN_PRIORITY, MAX_PRIORITY = -10, 10


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is and what it accepts. Sizes in pixels, lengths in tokens."""

    id: str
    family: str
    checkpoint_hash: str  # of base, adapter and sigma table; equal hashes give equal pixels
    nfe: int  # network evaluations per picture at the defaults
    sigmas: tuple[float, ...]  # one per step, without the final 0
    guidance: float  # weight w; 1 is off and costs one evaluation a step, anything else two
    width: int
    height: int
    size_multiple: int
    min_side: int
    max_side: int
    max_prompt_tokens: int
    description: str = ""
    free_steps: bool = False  # a multi-step base, which any number of steps suits; others were trained for their table
    guidance_off: float = 1.0  # what the family's users call no guidance, see `validation.weight_of`
    adapter: Literal["none", "fused", "separate"] = "none"  # how the version keeps it; separate has a scale per request
    sizes: tuple[tuple[int, int], ...] = ()  # the only ones, of an exported engine; () is any within the limits


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make. Validated by the engine; `steps` and `guidance` of None mean the checkpoint's own.

    `guidance` is the weight w of `away + w * (towards - away)`, 1 is off, whatever the family's own convention is.
    `model` is the id of a served checkpoint, empty for the first. A `negative_prompt` needs guidance. A few-step
    version takes another number of steps than its own only with `allow_untrained_schedule`. A prompt beyond the
    version's tokens is refused, or cut with `truncate_prompt`. `adapter_scale` multiplies what the version's adapter
    adds, where adapters are kept separate: 0 is the base, None is 1.
    """

    prompt: str
    seed: int
    width: int
    height: int
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    model: str = ""
    allow_untrained_schedule: bool = False
    truncate_prompt: bool = False
    adapter_scale: float | None = None

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Request:
        """What makes a picture again, of what `GeneratedImage.recipe` said. Its `checkpoint_hash` is not looked at."""
        return cls(
            prompt=recipe["prompt"],
            seed=recipe["seed"],
            width=recipe["width"],
            height=recipe["height"],
            steps=len(recipe["sigmas"]),
            guidance=recipe["guidance"],
            negative_prompt=recipe.get("negative_prompt", ""),
            model=recipe["model"],
            allow_untrained_schedule=recipe.get("untrained_schedule", False),
            truncate_prompt=recipe.get("truncated", False),
            adapter_scale=recipe.get("adapter_scale"),
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a client asks: what the scheduler needs beside the request itself."""

    deadline_ms: float | None = None  # from now until the pictures are there; None is whenever they can be
    priority: int = 0  # higher goes first, MIN_PRIORITY to MAX_PRIORITY
    tenant: str = ""  # whose share of the device this comes from, such as an API key's id


@dataclass(frozen=True, slots=True)
class Shape:
    """What pictures must share to share a forward: size in pixels, padded text length in tokens, guidance on or off."""

    width: int
    height: int
    text: int
    guided: bool = False

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.text} tokens{', guided' if self.guided else ''}"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a client hears while its pictures are made: evaluation `step` of `total` of its picture `index` is done."""

    index: int
    step: int
    total: int
    preview: Image.Image | None = None  # the predicted clean picture, in small; None unless previews were asked for


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What a step callback gets: step `index` of `total`, and the predicted clean latents (B, C, H, W) so far."""

    index: int
    total: int
    sigma: float
    clean_latents: Tensor


StepCallback = Callable[[StepEvent], None]


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A picture with everything that is needed to make it again."""

    image: Image.Image
    prompt: str
    seed: int
    width: int
    height: int
    nfe: int  # counted at the denoiser, not configured
    sigmas: tuple[float, ...]
    guidance: float
    model: str
    checkpoint_hash: str
    timings_ms: Mapping[str, float] = field(default_factory=dict[str, float])  # text, denoise, decode, total
    negative_prompt: str = ""
    tokens: int = 0  # of the whole prompt, its template included
    untrained_schedule: bool = False  # made in another number of steps than the version was trained for
    truncated: bool = False  # not all of the prompt, or of the negative one, was read
    adapter_scale: float = 1.0

    def recipe(self) -> dict[str, Any]:
        """Everything but the pixels and the timings, JSON-ready; what is as usual has no entry of its own.

        `Request.from_recipe` makes the picture again.
        """
        names = ("prompt", "seed", "width", "height", "nfe", "guidance", "model", "checkpoint_hash")
        plain = {name: getattr(self, name) for name in names} | {"sigmas": list(self.sigmas)}
        unusual = {"negative_prompt": "", "untrained_schedule": False, "truncated": False, "adapter_scale": 1.0}
        said = ((name, getattr(self, name), usual) for name, usual in unusual.items())
        return plain | {name: value for name, value, usual in said if value != usual}

    def png(self) -> bytes:
        """The picture as PNG with the recipe in text chunks: the whole as JSON, and `prompt` and `seed` plainly."""
        from PIL import PngImagePlugin

        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(RECIPE_KEY, json.dumps(self.recipe(), ensure_ascii=False))
        chunks.add_itxt("prompt", self.prompt)
        chunks.add_text("seed", str(self.seed))
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", pnginfo=chunks)
        return buffer.getvalue()
