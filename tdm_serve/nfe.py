"""Counts network evaluations at the denoiser, per picture; a guidance pair is two."""

from __future__ import annotations

from torch import Tensor

from tdm_serve.backends.base import Denoise
from tdm_serve.models.routed import Route


class CountedDenoiser:
    """Wraps a denoiser; `evaluations` grows by the batch length of every call."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.evaluations = 0

    def __call__(
        self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor:
        self.evaluations += len(latents)
        return self.denoise(latents, modulation, text, route, lengths)
