"""One picture under way, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape
from tdm_serve.models.routed import Variant
from tdm_serve.sampling import Row
from tdm_serve.validation import is_untrained


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sample:
    """A place in a sampler table, and the tensors of that place. Only `Engine.step` moves it."""

    request: Request
    info: ModelInfo  # of its version
    variant: Variant
    shape: Shape
    rows: tuple[Row, ...]
    guidance: float
    text: Tensor  # (1, L, D), refined
    away: Tensor | None  # (1, L, D) of the negative prompt, with guidance
    latents: Tensor  # (1, C, h, w)
    clean: Tensor  # (1, C, h, w), the last prediction
    index: int = 0
    nfe: int = 0
    tokens: int = 0  # of the whole prompt
    truncated: bool = False
    timings_ms: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def done(self) -> bool:
        return self.index == len(self.rows)

    @property
    def row(self) -> Row:
        """The table's row of the next evaluation."""
        return self.rows[self.index]

    def wrap(self, picture: Image.Image) -> GeneratedImage:
        """The finished picture with its recipe."""
        request, timings = self.request, self.timings_ms
        return GeneratedImage(
            image=picture,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            width=request.width,
            height=request.height,
            nfe=self.nfe,
            sigmas=tuple(row.sigma for row in self.rows),
            guidance=self.guidance,
            model=self.info.id,
            checkpoint_hash=self.info.checkpoint_hash,
            timings_ms={**timings, "total": sum(timings.values())},
            tokens=self.tokens,
            untrained_schedule=is_untrained(request, self.info),
            truncated=self.truncated,
            adapter_scale=self.variant.scale,
        )
