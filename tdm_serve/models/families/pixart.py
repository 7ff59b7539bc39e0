"""The PixArt-alpha family at 512 pixels: diffusers' transformer as it is, T5 with its padding masked.

Captions are cleaned as the stock pipeline does by default (`captions`). Pictures are made at the size that is asked
for, where the stock pipeline makes the nearest of its list of sizes and scales that picture: at sizes of the list, such
as 512x512, both are the same. The transformer's second half of channels, a learned variance that deterministic samplers
do not read, is dropped. Bases for 1024 pixels, which take the picture's size as a condition, are refused.
"""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from tdm_serve.errors import CheckpointError
from tdm_serve.models.families.base import too_long
from tdm_serve.models.families.captions import LONGEST, cleaned
from tdm_serve.models.families.clip import Reader
from tdm_serve.models.families.plain import PlainFamily
from tdm_serve.models.routed import Route


class PixArtDenoiser(nn.Module):
    """The transformer in the signature that backends know. The last feature of a token says whether it is one."""

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        text: Tensor,
        route: Route = (),  # noqa: ARG002 - one version
        lengths: Tensor | None = None,  # noqa: ARG002 - the text's last feature masks its padding
    ) -> Tensor:
        """Output at latents (B, C, H, W), given `modulation` (B, 1, 1), the time, and `text` (B, L, D)."""
        output = self.transformer(
            latents,
            encoder_hidden_states=text[..., :-1],
            encoder_attention_mask=text[..., -1],
            timestep=modulation.flatten(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]


class PixArt(PlainFamily):
    """A loaded PixArt-alpha base with one version."""

    def load_text(self) -> None:
        self.limit = self.spec.max_prompt_tokens
        self.reader = Reader(self.spec.base / "tokenizer", self.limit)
        self.padding = int(self.reader.tokenizer.pad_token_id)
        self.text_encoder = self.encoder(T5EncoderModel, "text_encoder")

    def load_network(self) -> tuple[nn.Module, nn.Module, int]:
        base = self.spec.base
        transformer = self.placement.network(PixArtTransformer2DModel, base / "transformer")
        if transformer.use_additional_conditions:
            raise CheckpointError(f"{base} takes the picture's size as a condition; of PixArt only 512 pixels are read")
        self.patch = int(transformer.config["patch_size"])
        return transformer, PixArtDenoiser(transformer), int(transformer.config["in_channels"])

    def tokens(self, prompt: str, truncate: bool = False) -> list[int]:
        return super().tokens(cleaned(prompt[:LONGEST]), truncate)

    def count(self, prompt: str) -> int:
        return super().count(cleaned(prompt[:LONGEST]))

    def check_prompt(self, prompt: str, param: str = "prompt", truncate: bool = False) -> int:
        if len(prompt) > LONGEST and not truncate:
            raise too_long(param, f"{len(prompt)} characters, and this checkpoint reads at most {LONGEST}")
        return super().check_prompt(prompt, param, truncate)

    def encoded(self, ids: Tensor) -> Tensor:
        """Features (B, L, D + 1) of ids (B, L); the last one is 1 for tokens and 0 for padding."""
        mask = (ids != self.padding).long()
        features = self.text_encoder(ids, attention_mask=mask)[0]
        return torch.cat((features, mask.unsqueeze(-1).to(features)), dim=-1)
