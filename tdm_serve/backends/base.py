"""The one signature that all backends share."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Denoise(Protocol):
    """latents (B, C, H, W), modulation (B, M, D), refined text (B, L, D) -> velocity (B, C, H, W)."""

    def __call__(self, latents: Tensor, modulation: Tensor, text: Tensor) -> Tensor: ...
