"""The Stable Diffusion 1.5 family: diffusers' UNet as it is, one CLIP encoder, a variance-preserving process."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from tdm_serve.models.families.clip import Reader
from tdm_serve.models.families.plain import PlainFamily
from tdm_serve.models.routed import Route


class UNetDenoiser(nn.Module):
    """The UNet in the signature that backends know; its output is what the checkpoint's `prediction` says."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        text: Tensor,
        route: Route = (),  # noqa: ARG002 - one version
        lengths: Tensor | None = None,  # noqa: ARG002 - texts of one length
    ) -> Tensor:
        """Output (B, C, H, W) at latents (B, C, H, W), given `modulation` (B, 1, 1), the time, and text (B, L, D)."""
        return self.unet(latents, modulation.flatten(), text, return_dict=False)[0]


class SD15(PlainFamily):
    """A loaded Stable Diffusion 1.x base with one version."""

    def load_text(self) -> None:
        self.reader = Reader(self.spec.base / "tokenizer")
        self.limit = min(self.reader.length, self.spec.max_prompt_tokens)
        self.text_encoder = self.encoder(CLIPTextModel, "text_encoder")

    def load_network(self) -> tuple[nn.Module, nn.Module, int]:
        unet = self.placement.network(UNet2DConditionModel, self.spec.base / "unet")
        return unet, UNetDenoiser(unet), int(unet.config["in_channels"])

    def encoded(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids).last_hidden_state  # padding is read, too, as the models were trained
