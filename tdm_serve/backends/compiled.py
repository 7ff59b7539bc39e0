"""The denoiser under torch.compile: one compilation per shape and version, then faster steps.

A batch of several versions runs one forward a version: compiled together, every mixture would be a compilation. So
would every strength of an adapter that requests choose; only the usual one is compiled.
"""

from __future__ import annotations

import shutil
from typing import cast

import torch
from torch import Tensor, nn

from tdm_serve.backends.base import Denoise, by_version
from tdm_serve.errors import BackendUnavailable
from tdm_serve.models.routed import Route


def create(denoiser: nn.Module) -> Denoise:
    on_cpu = next(denoiser.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise BackendUnavailable(
            "backend 'compiled' needs a C++ compiler on a CPU, and none of g++, c++, clang++ is on the PATH; "
            "install one, or choose backend 'eager'"
        )
    compiled = cast(Denoise, torch.compile(denoiser, dynamic=False))

    def denoise(
        latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor:
        if len(route) > 1:
            return by_version(denoise, latents, modulation, text, route, lengths)
        if any(variant.scale != 1.0 for variant, _ in route):  # every strength would be a compilation
            return denoiser(latents, modulation, text, route, lengths)
        return compiled(latents, modulation, text, route, lengths)

    return denoise
