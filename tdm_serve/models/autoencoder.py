"""`AutoencoderKL` with the types that it has; diffusers declares other ones (tuples, FloatTensor)."""

from __future__ import annotations

from typing import cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor


def posterior(vae: AutoencoderKL, pictures: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of raw latents (B, C, H / 8, W / 8) of pictures (B, 3, H, W) in [-1, 1]."""
    return cast(AutoencoderKLOutput, vae.encode(pictures)).latent_dist


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), about [-1, 1], of raw latents (B, C, H / 8, W / 8)."""
    return cast(DecoderOutput, vae.decode(cast(torch.FloatTensor, latents))).sample
