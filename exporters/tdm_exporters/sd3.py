"""SD3 and SD3.5 as graphs: the text encoders that the checkpoint has, and the denoiser's functions.

Texts are padded to one length, and the padding is attended, so the length of the text is fixed in the graphs; batch and
picture size are open. A CLIP encoder has two results, which leave its graph as one tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from tdm_exporters.parts import Limits, Part, Velocity, as_kind, decoder_part, example, open_latents, rows
from tdm_serve.models.families.sd3 import SD3
from tdm_serve.models.families.sd3_denoiser import SD3Denoiser


class Waves(Timesteps):
    """A time's sines and cosines, by torch's frequencies: a runtime's rounding of them counts a thousandfold."""

    frequencies: Tensor  # (channels / 2,)

    @classmethod
    def of(cls, source: Timesteps) -> Waves:
        waves, half = as_kind(source, cls), source.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)  # the order of diffusers' own
        waves.frequencies = (exponent / (half - source.downscale_freq_shift)).exp()
        return waves

    def forward(self, timesteps: Tensor) -> Tensor:
        phase = self.scale * (timesteps[:, None].float() * self.frequencies)
        pair = (phase.cos(), phase.sin()) if self.flip_sin_to_cos else (phase.sin(), phase.cos())
        return torch.cat(pair, dim=-1)


class OpenDenoiser(SD3Denoiser):
    """A packed denoiser's forward with sizes left open. Shares all weights with the one that it is made of."""

    @classmethod
    def of(cls, denoiser: SD3Denoiser) -> OpenDenoiser:
        opened = as_kind(denoiser, cls)
        opened.time = as_kind(denoiser.time, type(denoiser.time))
        opened.time.time_proj = Waves.of(denoiser.time.time_proj)
        return opened

    def _embed(self, latents: Tensor) -> Tensor:
        batch, channels, high, wide = latents.shape
        height, width, side = high // self.patch, wide // self.patch, self.patch
        patches = latents.reshape(batch, channels, height, side, width, side).permute(0, 2, 4, 1, 3, 5)
        linear = self.embed_image.proj
        x = F.linear(patches.flatten(3).flatten(1, 2), linear.weight.flatten(1), linear.bias)
        return (x + self._positions(height, width).flatten(1, 2)).to(latents.dtype)

    def _positions(self, height: int, width: int) -> Tensor:
        """As places to read, not as a cut, whose bounds a graph would have to prove."""
        embed: Any = self.embed_image
        side: int = embed.pos_embed_max_size
        whole: Tensor = embed.pos_embed.unflatten(1, (side, side))  # (1, side, side, D)
        rows = torch.arange(height, device=whole.device) + (side - height) // 2
        columns = torch.arange(width, device=whole.device) + (side - width) // 2
        return whole.index_select(1, rows).index_select(2, columns)


class Refiner(nn.Module):
    """text features (B, L, C), pooled ones (B, P) -> refined text (B, L + 1, D)."""

    def __init__(self, denoiser: OpenDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        return self.denoiser.refine_text(features, pooled)


class Modulation(nn.Module):
    """time (B,) up to 1000, refined pooled text (B, D) -> modulation (B, M, D)."""

    def __init__(self, denoiser: SD3Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, time: Tensor, pooled: Tensor) -> Tensor:
        return self.denoiser.modulation(time, pooled.unsqueeze(1))


class Clip(nn.Module):
    """token ids (B, T) -> (B, T + 1, C): the second to last hidden state and, as the last row, the pooled embedding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        output = self.encoder(ids, output_hidden_states=True)
        return torch.cat((output.hidden_states[-2], output.text_embeds.unsqueeze(1)), dim=1)


class T5(nn.Module):
    """token ids (B, T) -> features (B, T, C)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids)[0]


def parts_of(model: SD3, limits: Limits) -> list[Part]:
    """The graphs of a loaded checkpoint, smallest first."""
    dtype, eager, opened = model.dtype, model.denoiser, OpenDenoiser.of(model.denoiser)
    batch, n = rows(limits), example(limits.batch)
    features = torch.randn(n, model.length - 1, model.width, dtype=dtype)
    pooled = torch.randn(n, model.pooled, dtype=dtype)
    text = opened.refine_text(features, pooled)
    time = torch.full((n,), 500.0)
    latents, sized = open_latents(limits, model.channels, model.factor, model.patch, dtype)
    return [
        Part(
            "modulation",
            Modulation(opened),
            {"time": time, "pooled": text[:, -1]},
            {"time": batch, "pooled": batch},
            Modulation(eager),
        ),
        *_encoders(model, limits),
        Part(
            "refiner", Refiner(opened), {"features": features, "pooled": pooled}, {"features": batch, "pooled": batch}
        ),
        Part(
            "denoiser",
            Velocity(opened),
            {"latents": latents, "modulation": opened.modulation(time, text), "text": text},
            {"latents": sized, "modulation": batch, "text": batch},
            eager,
        ),
        decoder_part(model.vae, latents, sized),
    ]


def _encoders(model: SD3, limits: Limits) -> list[Part]:
    """Two CLIPs, and T5 where the checkpoint has it."""
    modules: list[nn.Module] = [*map(Clip, model.clips), *([] if model.t5 is None else [T5(model.t5)])]
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lengths = [reader.length for reader in model.readers]
    n, batch = example(limits.batch), {"ids": rows(limits)}
    return [
        Part(name, module, {"ids": torch.ones(n, length, dtype=torch.int64)}, batch)
        for name, module, length in zip(names, modules, lengths, strict=False)
    ]
