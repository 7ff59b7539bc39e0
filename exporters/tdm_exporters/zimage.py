"""Z-Image as graphs: the five functions that the engine calls, with batch, picture size and text length left open.

The same modules over the same weights as in eager mode. Only what depends on sizes is written anew, without branches:
padding is cut to length instead of added where it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdm_exporters.parts import Limits, Part, Velocity, as_kind, axis, decoder_part, example, open_latents, rows
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.families.zimage_denoiser import PATCH, TEXT_MULTIPLE, ZImageDenoiser, padded_length
from tdm_serve.models.families.zimage_rope import Rope, Tables
from tdm_serve.models.routed import Route, project


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
        opened = as_kind(denoiser, cls)
        opened.rope = as_kind(denoiser.rope, OpenRope)
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


def parts_of(model: ZImage, limits: Limits) -> list[Part]:
    """The graphs of a loaded checkpoint, smallest first."""
    dtype, opened, batch = model.dtype, OpenDenoiser.of(model.denoiser), rows(limits)
    length, n = padded_length(limits.text), example(limits.batch)
    most = length // TEXT_MULTIPLE
    words = {1: axis("words", most, TEXT_MULTIPLE)} if most > 1 else {}
    text = example(most) * TEXT_MULTIPLE
    sigma = torch.full((n,), 0.5)
    modulation = opened.modulation(sigma)
    ids = torch.ones(n, length, dtype=torch.int64)
    mask = (torch.arange(length) < length // 2).long().expand(n, -1)  # with padding, or transformers leaves it out
    features: int = model.text_encoder.config.hidden_size
    latents, sized = open_latents(limits, model.channels, model.factor, PATCH, dtype)
    encoder, eager = TextEncoder(model.text_encoder), model.denoiser
    return [
        Part("modulation", Modulation(opened), {"sigma": sigma}, {"sigma": batch}, eager.modulation),
        Part("text_encoder", encoder, {"ids": ids, "mask": mask}, {"ids": batch, "mask": batch}),
        Part(
            "refiner",
            Refiner(opened),
            {"features": torch.randn(n, text, features, dtype=dtype), "lengths": torch.full((n,), 20)},
            {"features": batch | words, "lengths": batch},
            eager.refine_text,
        ),
        Part(
            "denoiser",
            Velocity(opened),
            {
                "latents": latents,
                "modulation": modulation,
                "text": torch.randn(n, text, modulation.shape[-1], dtype=dtype),
            },
            {"latents": sized, "modulation": batch, "text": batch | words},
            eager,
        ),
        decoder_part(model.vae, latents, sized),
    ]
