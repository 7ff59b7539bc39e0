"""SD3 and SD3.5 as trainers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from tdm_finetune.family import FamilyTrainee, Unpacked
from tdm_serve.models.families.sd3 import SD3
from tdm_serve.models.families.sd3_denoiser import JointBlock, SD3Denoiser

TIMES = 1000.0  # the network's time at pure noise


class JointNet(nn.Module):
    """Text projection, modulation and denoising as one module, so that adapters reach all of them."""

    def __init__(self, denoiser: SD3Denoiser, width: int, pooled: int) -> None:
        """`width` and `pooled` are those of the text features and of the pooled embedding, the last row's."""
        super().__init__()
        self.denoiser, self.width, self.pooled = denoiser, width, pooled

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and levels (B,), for features (B, L + 1, D)."""
        denoiser, text = self.denoiser, text.to(latents.dtype)
        refined = denoiser.refine_text(text[:, :-1, : self.width], text[:, -1, : self.pooled])
        return denoiser(latents, denoiser.modulation(TIMES * sigma, refined), refined)


class PartsOfSD3(Unpacked, SD3):  # pyright: ignore[reportIncompatibleMethodOverride] - takes what the family's takes
    """SD3 with its network as diffusers has it."""


class SD3Trainee(FamilyTrainee):
    """Adapters go on the eight projections of joint attention, as in the official trainers of TDM-R1 and DGPO."""

    kind = PartsOfSD3
    usual = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def wrapped(self) -> nn.Module:
        return JointNet(self.family.denoiser, self.family.width, self.family.pooled)

    def blocks(self) -> Sequence[nn.Module]:
        """The joint blocks, behind the parts of them that `SD3Denoiser.modulation` calls from outside."""
        blocks = [cast(JointBlock, block) for block in self.family.denoiser.blocks]
        return [*(part for block in blocks for part in (block.modulation, block.text_modulation)), *blocks]
