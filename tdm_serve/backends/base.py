"""The one signature that all backends share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tdm_serve.errors import ConfigError
from tdm_serve.models.routed import Route


class Denoise(Protocol):
    """latents (B, C, H, W), modulation (B, M, D), refined text (B, L, D) -> velocity (B, C, H, W).

    `route` says which rows are of which version of the base; () where only one is loaded. A backend that cannot run
    several versions in one forward runs one forward a version (`by_version`). `lengths` (B,) int32 are the text tokens
    of each row where they differ, None where the text is full.
    """

    def __call__(
        self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor: ...


def by_version(
    denoise: Denoise, latents: Tensor, modulation: Tensor, text: Tensor, route: Route, lengths: Tensor | None = None
) -> Tensor:
    """One call for each run of rows of one version."""
    sizes = [rows for _, rows in route]
    counts = [None] * len(sizes) if lengths is None else lengths.split(sizes)
    parts = zip(latents.split(sizes), modulation.split(sizes), text.split(sizes), route, counts, strict=True)
    return torch.cat([denoise(x, rows, words, (run,), count) for x, rows, words, run, count in parts])


def needs_engine(name: str) -> ConfigError:
    """For a backend that runs exported engines, where none was named."""
    return ConfigError(
        f"backend {name!r} runs an exported engine: name its folder with --engine (see `tdm-serve export`)"
    )
