"""The denoiser under torch.compile: one compilation per shape, then faster steps."""

from __future__ import annotations

import shutil
from typing import cast

import torch
from torch import Tensor, nn

from tdm_serve.backends.base import Denoise
from tdm_serve.errors import BackendUnavailable


def create(denoiser: nn.Module) -> Denoise:
    on_cpu = next(denoiser.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise BackendUnavailable(
            "backend 'compiled' needs a C++ compiler on a CPU, and none of g++, c++, clang++ is on the PATH; "
            "install one, or choose backend 'eager'"
        )
    compiled = cast(Denoise, torch.compile(denoiser, dynamic=False))
    seen: set[tuple[torch.Size, torch.Size]] = set()

    def denoise(latents: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        shapes = latents.shape, text.shape
        if shapes not in seen:
            # Rotary tables are complex-valued to build, which the compiler cannot: one eager call stores them.
            denoiser(latents, modulation, text)
            seen.add(shapes)
        return compiled(latents, modulation, text)

    return denoise
