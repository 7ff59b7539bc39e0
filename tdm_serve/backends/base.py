"""The one signature that all backends share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tdm_serve.models.routed import Route


class Denoise(Protocol):
    """latents (B, C, H, W), modulation (B, M, D), refined text (B, L, D) -> velocity (B, C, H, W).

    `route` says which rows are of which version of the base; () where only one is loaded. A backend that cannot run
    several versions in one forward runs one forward a version (`by_version`).
    """

    def __call__(self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = ()) -> Tensor: ...


def by_version(denoise: Denoise, latents: Tensor, modulation: Tensor, text: Tensor, route: Route) -> Tensor:
    """One call for each run of rows of one version."""
    sizes = [rows for _, rows in route]
    parts = zip(latents.split(sizes), modulation.split(sizes), text.split(sizes), route, strict=True)
    return torch.cat([denoise(x, rows, words, (run,)) for x, rows, words, run in parts])
