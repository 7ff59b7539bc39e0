"""The shared nouns: what is asked, what comes back, what a model can do. Light on purpose; no torch here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make. Validated by the engine; `steps` and `guidance` of None mean the checkpoint's own.

    `model` is the id of a served checkpoint, empty for the first. A `negative_prompt` needs guidance.
    """

    prompt: str
    seed: int
    width: int
    height: int
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    model: str = ""


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
    tokens: int = 0  # of the prompt, its template included

    def recipe(self) -> dict[str, Any]:
        """Everything but the pixels and the timings, JSON-ready; a negative prompt where there was one."""
        names = ("prompt", "seed", "width", "height", "nfe", "guidance", "model", "checkpoint_hash")
        plain = {name: getattr(self, name) for name in names} | {"sigmas": list(self.sigmas)}
        return plain | ({"negative_prompt": self.negative_prompt} if self.negative_prompt else {})

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
