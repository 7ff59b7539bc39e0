"""What a family's graphs are described with, and what all families share of them.

A part is a module with example inputs, some of whose axes are open, and the function of eager execution that it must
equal. Modules share the weights that are loaded; only what depends on sizes is written anew, without branches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.export import Dim

from tdm_serve.artifact import Size
from tdm_serve.models.autoencoder import decode

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a graph must take: up to `batch` pictures of `sizes`, in pixels, and prompts of up to `text` tokens."""

    batch: int
    sizes: tuple[Size, ...]
    text: int

    @property
    def side(self) -> int:
        """The longest, in pixels."""
        return max(side for size in self.sizes for side in size)


@dataclass(frozen=True, slots=True)
class Part:
    """One graph: a module, example inputs by name, which of their axes are open, and what it must equal.

    `eager` takes the inputs in their order; by default it is the module itself.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, Any]]
    eager: Callable[..., Tensor] | None = None

    @property
    def open_axes(self) -> dict[str, dict[int, Any]]:
        """As `torch.export` takes them: by parameter of the module's forward, which are named like the inputs."""
        return {name: dict(self.axes[name]) for name in self.inputs}

    @property
    def expected(self) -> Callable[..., Tensor]:
        return self.eager or self.module


class Velocity(nn.Module):
    """latents (B, C, h, w), modulation (B, M, D), refined text (B, L, D) -> velocity (B, C, h, w)."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        return self.denoiser(latents, modulation, text)


class Decoder(nn.Module):
    """raw latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1]. Whole, not in tiles, whatever the size."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        joined = self.vae.post_quant_conv
        return self.vae.decoder(latents if joined is None else joined(latents))


def decoder_part(vae: AutoencoderKL, latents: Tensor, axes: Mapping[int, Any]) -> Part:
    """The autoencoder's decoding half, on latents (B, C, h, w)."""
    return Part("decoder", Decoder(vae), {"latents": latents}, {"latents": axes}, partial(decode, vae))


def open_latents(
    limits: Limits, channels: int, factor: int, multiple: int, dtype: torch.dtype
) -> tuple[Tensor, dict[int, Any]]:
    """Example latents (B, C, h, w) and their open axes; `factor` is pixels a latent, sides go by `multiple` latents."""
    most = limits.side // factor // multiple
    sides = {2: axis("height", most, multiple), 3: axis("width", most, multiple)} if most > 1 else {}
    side = example(most) * multiple
    latents = torch.randn(example(limits.batch), channels, side, side, dtype=dtype)
    return latents, rows(limits) | sides


def rows(limits: Limits) -> dict[int, Any]:
    """The open axis of a batch, where it is one."""
    return {} if limits.batch == 1 else {0: axis("batch", limits.batch)}


def axis(name: str, most: int, multiple: int = 1) -> Any:
    """An open axis of 1 to `most` times `multiple`; None where there is one choice only."""
    if most <= 1:
        return None
    whole = Dim(name, min=1, max=most)
    return multiple * whole if multiple > 1 else whole


def example(most: int) -> int:
    """A length for example inputs; torch would take 1 for a constant."""
    return min(2, most) if most < 3 else 3


def as_kind(module: nn.Module, kind: type[M]) -> M:
    """The same module with the methods of a subclass; its own parts are shared, replacing one changes only the copy."""
    other = copy.copy(module)
    other.__dict__["_modules"] = dict(module.__dict__["_modules"])
    other.__class__ = kind
    return cast(M, other)
