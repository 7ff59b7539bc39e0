"""The Stable Diffusion 1.5 family: diffusers' UNet as it is, one CLIP encoder, a variance-preserving process.

The UNet repeats its time and text projections in every call, and its modules take no routes: it serves one version of
a base at a time, whose adapter is added to the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from tdm_serve.errors import PromptTooLong
from tdm_serve.models.adapters import fuse_lora
from tdm_serve.models.families.base import Family, placed
from tdm_serve.models.families.clip import Reader
from tdm_serve.models.routed import Route
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters, Versions
from tdm_serve.sampling import Row


class UNetDenoiser(nn.Module):
    """The UNet in the signature that backends know; its output is what the checkpoint's `prediction` says."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = ()) -> Tensor:  # noqa: ARG002
        """Output (B, C, H, W) at latents (B, C, H, W), given `modulation` (B, 1, 1), the time, and text (B, L, D)."""
        return self.unet(latents, modulation.flatten(), text, return_dict=False)[0]


class SD15(Family):
    """A loaded Stable Diffusion 1.x base with one version."""

    denoiser: UNetDenoiser
    exact_on_cpu = False

    def load_text(self, device: torch.device, dtype: torch.dtype) -> None:
        self.reader = Reader(self.spec.base / "tokenizer")
        self.limit = min(self.reader.length, self.spec.max_prompt_tokens)
        self.text_encoder = placed(CLIPTextModel.from_pretrained(self.spec.base / "text_encoder", dtype=dtype), device)

    def load_denoiser(
        self, specs: Sequence[ModelSpec], device: torch.device, dtype: torch.dtype, adapters: Adapters
    ) -> None:
        assert len(specs) == 1, "the table of families says that versions are not shared"
        unet = UNet2DConditionModel.from_pretrained(self.spec.base / "unet", dtype=torch.float32)
        if self.spec.adapter is not None:
            fuse_lora(unet, self.spec.adapter, "unet.")
        self.denoiser = placed(UNetDenoiser(unet), device).to(dtype)
        self.versions = Versions({}, {self.spec.id: None}, adapters)
        self.channels = int(unet.config["in_channels"])

    def tokens(self, prompt: str) -> list[int]:
        return list(self.reader.fitted(prompt))

    def count(self, prompt: str) -> int:
        return len(self.reader.ids(prompt))

    def check_prompt(self, prompt: str, param: str = "prompt") -> int:
        if (count := self.count(prompt)) > self.limit:
            raise PromptTooLong(
                f"the {param.replace('_', ' ')} has {count} tokens; this checkpoint reads at most {self.limit}",
                param=param,
            )
        return self.reader.length

    def encode(self, prompts: Sequence[Sequence[int]], *, together: bool = False) -> list[Tensor]:
        """Features (length, D) of each prompt; padding is read, too, as the models were trained."""
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        parts = ids.split(len(prompts) if together else 1)
        return [row.clone() for part in parts for row in self.text_encoder(part).last_hidden_state]

    def refine(self, features: Tensor, length: int, version: str = "") -> Tensor:  # noqa: ARG002 - one version
        assert length == len(features)
        return features.unsqueeze(0)

    def timed(self, row: Row, text: Tensor, version: str = "") -> Tensor:  # noqa: ARG002 - needs the time alone
        return torch.full((1, 1, 1), row.t, dtype=torch.float32, device=self.device)
