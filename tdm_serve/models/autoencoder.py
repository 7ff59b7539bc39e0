"""`AutoencoderKL` with the types that it has (diffusers declares tuples, FloatTensor), laid out for inference.

A decoder's memory grows with the pixels, and in one layer, its attention, with their square. Pictures with a side above
`TILE_PX` are decoded in overlapping tiles, whose borders are blended; every tile has its own normalisation, so colours
may drift a little from tile to tile. Up to `TILE_PX` nothing changes, not one bit.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

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
