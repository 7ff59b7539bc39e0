"""Z-Image as graphs: the five functions that the engine calls, with batch, picture size and text length left open.

The same modules over the same weights as in eager mode. Only what depends on sizes is written anew, without branches:
padding is cut to length instead of added where it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.export import Dim

from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.families.zimage_denoiser import PATCH, TEXT_MULTIPLE, ZImageDenoiser
from tdm_serve.models.families.zimage_rope import Rope, Tables
from tdm_serve.models.routed import Route, project

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a graph must take: up to `batch` pictures of up to `side` pixels each way, up to `text` padded tokens."""

    batch: int
    side: int
    text: int


@dataclass(frozen=True, slots=True)
class Part:
    """One graph: a module, example inputs by name, and which of their axes are open."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, Any]]

    @property
    def open_axes(self) -> dict[str, dict[int, Any]]:
        """As `torch.export` takes them: by parameter of the module's forward, which are named like the inputs."""
        return {name: dict(self.axes[name]) for name in self.inputs}


class OpenRope(Rope):
    """Rotary tables whose padding may be of any length, none included, without a branch."""

    def joint(self, text: int, height: int, width: int, padding: int, lengths: Tensor | None = None) -> Tables:
        assert lengths is None, "a graph's rows have texts of one length"
        sequence, rows, columns = self.axes
        place = sequence[:, text + 1 : text + 2, None]  # (2, 1, 1, d)
        parts = (place, rows[:, :height, None], columns[:, None, :width])
        image = torch.cat([part.expand(2, height, width, -1) for part in parts], dim=-1).flatten(1, 2)
        spare = torch.cat((image, self._nowhere(TEXT_MULTIPLE - 1)), dim=1)[:, : height * width + padding]
        table = torch.cat((spare, self._text(text)), dim=1).unsqueeze(-2)  # (2, S, 1, D / 2)
        return table[0], table[1]


class OpenDenoiser(ZImageDenoiser):
    """A packed denoiser's forward with sizes left open. Shares all weights with the one that it is made of."""

    @classmethod
    def of(cls, denoiser: ZImageDenoiser) -> OpenDenoiser:
        opened = _as(denoiser, cls)
        opened.rope = _as(denoiser.rope, OpenRope)
        return opened

    def _embed(self, latents: Tensor, route: Route) -> Tensor:
        batch, channels, height, width = latents.shape
        patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        x = project(self.embed_image, patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), route)
        spare = self.image_pad.to(x.dtype).expand(batch, TEXT_MULTIPLE - 1, -1)
        return torch.cat((x, spare), dim=1)[:, : _padded(x.shape[1])]


def _padded(tokens: int) -> int:
    """`padded_length` without a negative dividend: graphs round divisions towards zero, Python rounds down."""
    return (tokens + TEXT_MULTIPLE - 1) // TEXT_MULTIPLE * TEXT_MULTIPLE


def _as(module: nn.Module, kind: type[M]) -> M:
    """The same module with the methods of a subclass; its own parts are shared, replacing one changes only the copy."""
    other = copy.copy(module)
    other.__dict__["_modules"] = dict(module.__dict__["_modules"])
    other.__class__ = kind
    return cast(M, other)


class Velocity(nn.Module):
    """latents (B, C, h, w), modulation (B, M, D), refined text (B, L, D) -> velocity (B, C, h, w)."""

    def __init__(self, denoiser: OpenDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        return self.denoiser(latents, modulation, text)


class Refiner(nn.Module):
    """text features (B, L, C), lengths (B,) -> refined text (B, L, D)."""

    def __init__(self, denoiser: OpenDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        return self.denoiser.refine_text(features, lengths)


class Modulation(nn.Module):
    """sigma (B,) -> modulation (B, M, D)."""

    def __init__(self, denoiser: OpenDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sigma: Tensor) -> Tensor:
        return self.denoiser.modulation(sigma)


class TextEncoder(nn.Module):
    """token ids (B, T) and mask (B, T) -> features (B, T, C); T is the longest padded text."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


class Decoder(nn.Module):
    """raw latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1]. Whole, not in tiles, whatever the size."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        joined = self.vae.post_quant_conv
        return self.vae.decoder(latents if joined is None else joined(latents))


def parts_of(model: ZImage, limits: Limits) -> list[Part]:
    """The graphs of a loaded checkpoint, smallest first."""
    dtype, opened = model.dtype, OpenDenoiser.of(model.denoiser)
    batch, length = _axis("batch", limits.batch), limits.text
    words = _axis("words", limits.text // TEXT_MULTIPLE, TEXT_MULTIPLE)
    side = limits.side // model.factor // PATCH
    height, width = _axis("height", side, PATCH), _axis("width", side, PATCH)
    text = _example(limits.text // TEXT_MULTIPLE) * TEXT_MULTIPLE
    high, wide = (_example(side) * PATCH,) * 2
    n = _example(limits.batch)
    modulation = opened.modulation(torch.full((n,), 0.5))
    refined, ids = modulation.shape[-1], torch.ones(n, length, dtype=torch.int64)
    mask = (torch.arange(length) < length // 2).long().expand(n, -1)  # with padding, or transformers leaves it out
    features: int = model.text_encoder.config.hidden_size
    latents = torch.randn(n, model.channels, high, wide, dtype=dtype)
    rows = {0: batch} if batch else {}
    sized = {**rows, **({2: height, 3: width} if height else {})}
    worded = {**rows, **({1: words} if words else {})}
    return [
        Part("modulation", Modulation(opened), {"sigma": torch.full((n,), 0.5)}, {"sigma": rows}),
        Part("text_encoder", TextEncoder(model.text_encoder), {"ids": ids, "mask": mask}, {"ids": rows, "mask": rows}),
        Part(
            "refiner",
            Refiner(opened),
            {"features": torch.randn(n, text, features, dtype=dtype), "lengths": torch.full((n,), 20)},
            {"features": worded, "lengths": rows},
        ),
        Part(
            "denoiser",
            Velocity(opened),
            {"latents": latents, "modulation": modulation, "text": torch.randn(n, text, refined, dtype=dtype)},
            {"latents": sized, "modulation": rows, "text": worded},
        ),
        Part("decoder", Decoder(model.vae), {"latents": latents}, {"latents": sized}),
    ]


def _axis(name: str, most: int, multiple: int = 1) -> Any:
    """An open axis of 1 to `most` times `multiple`; None where there is one choice only."""
    if most <= 1:
        return None
    whole = Dim(name, min=1, max=most)
    return multiple * whole if multiple > 1 else whole


def _example(most: int) -> int:
    """A length for example inputs; torch would take 1 for a constant."""
    return min(2, most) if most < 3 else 3
