"""`AutoencoderKL` with the types that it has (diffusers declares tuples, FloatTensor), laid out for inference.

A decoder's memory grows with the pixels, and in one layer, its attention, with their square. Pictures with a side above
`TILE_PX` are decoded in overlapping tiles, whose borders are blended; every tile has its own normalisation, so colours
may drift a little from tile to tile. Up to `TILE_PX` nothing changes, not one bit.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tdm_kernels import choices, group_norm_silu
from tdm_serve.models.kernel_choice import told

TILE_PX = 1024  # the size that the published models are trained for


def posterior(vae: AutoencoderKL, pictures: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of raw latents (B, C, H / 8, W / 8) of pictures (B, 3, H, W) in [-1, 1]."""
    return cast(AutoencoderKLOutput, vae.encode(pictures)).latent_dist


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), about [-1, 1], of raw latents (B, C, H / 8, W / 8)."""
    return cast(DecoderOutput, vae.decode(cast(torch.FloatTensor, latents))).sample


def laid_out(vae: AutoencoderKL) -> AutoencoderKL:
    """For inference: channels-last, the faster layout for its convolutions, and in tiles above `TILE_PX`."""
    # torch documents the layout as an argument but declares no overload with it.
    nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    tile(vae, TILE_PX)
    return vae


def tile(vae: AutoencoderKL, side_px: int) -> None:
    """Decodes pictures with a side above `side_px` in overlapping tiles of that size; smaller ones whole, as before."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = side_px, side_px // factor


class NormSiLU(nn.GroupNorm):
    """A GroupNorm and the SiLU behind it as one operation. Has the norm's own parameters, under their names."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        if torch.compiler.is_exporting():
            return F.silu(super().forward(input))
        x = input.contiguous(memory_format=torch.channels_last)  # as it is behind a convolution in that layout
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


def with_kernels(vae: AutoencoderKL) -> AutoencoderKL:
    """Hands the decoder's norms and the SiLU behind each to the kernel, where that is chosen for their device."""
    decoder: Any = vae.decoder  # declares classes for the layers that are replaced
    with told():
        for block in [one for one in decoder.modules() if isinstance(one, ResnetBlock2D)]:
            if isinstance(block.nonlinearity, nn.SiLU) and _chosen(block.norm1) and _chosen(block.norm2):
                block.norm1, block.norm2 = NormSiLU(block.norm1), NormSiLU(block.norm2)
                block.nonlinearity = nn.Identity()
        if isinstance(decoder.conv_act, nn.SiLU) and _chosen(decoder.conv_norm_out):
            decoder.conv_norm_out, decoder.conv_act = NormSiLU(decoder.conv_norm_out), nn.Identity()
    return vae


def _chosen(norm: nn.Module) -> TypeGuard[nn.GroupNorm]:
    """Whether the kernel is to run this norm."""
    if not isinstance(norm, nn.GroupNorm):
        return False
    like = norm.weight.new_empty(1, norm.num_channels, 1, 1).to(memory_format=torch.channels_last)
    return choices.group_norm_silu(like, norm.num_groups)
