"""SD1.5 and PixArt-alpha as trainers see them: diffusers' networks on a variance-preserving process.

A level counts noising steps, so that 0 is clean; the network's time is one less.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tdm_finetune.family import FamilyTrainee, Unpacked
from tdm_serve.models.families.pixart import PixArt
from tdm_serve.models.families.sd15 import SD15

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


class TimedNet(nn.Module):
    """A denoiser of the serving side with the level in place of the time."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """Output (B, C, H, W) at latents (B, C, H, W) and levels (B,) of at least 1, for features (B, L, D)."""
        return self.denoiser(latents, (level - 1).view(-1, 1, 1), text.to(latents.dtype))


class PlainTrainee(FamilyTrainee):
    usual = (*ATTENTION, *FEED_FORWARD)  # nobody has published which ones TDM's adapters of these families have

    def wrapped(self) -> nn.Module:
        return TimedNet(self.family.denoiser)

    def blocks(self) -> Sequence[nn.Module]:
        return [part for part in self.network.modules() if isinstance(part, BasicTransformerBlock | ResnetBlock2D)]


class PartsOfSD15(Unpacked, SD15):  # pyright: ignore[reportIncompatibleMethodOverride] - takes what the family's takes
    """SD1.5 with its network left alone."""


class PartsOfPixArt(Unpacked, PixArt):  # pyright: ignore[reportIncompatibleMethodOverride] - as above
    """PixArt with its network left alone."""


class SD15Trainee(PlainTrainee):
    kind = PartsOfSD15


class PixArtTrainee(PlainTrainee):
    kind = PartsOfPixArt
