"""Small networks of the product with random weights, for tests that hand their layers to the kernels."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from tdm_serve.models.families.sd3_denoiser import SD3Denoiser
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser

HEAD_DIM = 64


def drawn(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def zimage(head_dim: int = HEAD_DIM) -> ZImageDenoiser:
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=2 * head_dim,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[head_dim // 2, head_dim // 4, head_dim // 4],
        axes_lens=[128, 32, 32],
    )
    drawn(network)
    for name, parameter in network.named_parameters():
        if "norm_q" in name or "norm_k" in name:  # as trained ones are: about 1
            parameter.add_(1.0)
    return ZImageDenoiser(network).pack()


def velocity(denoiser: ZImageDenoiser, *, ragged: bool) -> Tensor:
    """Of two pictures, their texts of one padded length or of two."""
    generator = torch.Generator().manual_seed(1)
    like = denoiser.image_pad
    latents, text = (torch.randn(shape, generator=generator).to(like) for shape in ((2, 4, 12, 10), (2, 64, 20)))
    lengths = torch.tensor([64, 32], dtype=torch.int32, device=like.device) if ragged else None
    refined = denoiser.refine_text(text, torch.tensor([50, 20], device=like.device), (), lengths)
    levels = torch.tensor([0.9, 0.3], device=like.device)
    return denoiser(latents, denoiser.modulation(levels), refined, (), lengths)


def sd35() -> tuple[SD3Denoiser, tuple[Tensor, Tensor, Tensor]]:
    """SD3.5 with dual attention in its first block, and what its forward takes."""
    network = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=2 * HEAD_DIM,
        pooled_projection_dim=12,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    drawn(network)
    denoiser = SD3Denoiser(network).pack()
    text = denoiser.refine_text(torch.randn(2, 5, 20), torch.randn(2, 12))
    return denoiser, (torch.randn(2, 4, 8, 6), denoiser.modulation(torch.tensor([900.0, 3.0]), text), text)


def autoencoder(channels: tuple[int, int]) -> AutoencoderKL:
    """Two levels, with attention in the middle; groups are an eighth of the channels."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=channels,
        norm_num_groups=8,
        latent_channels=4,
    )
    drawn(vae)
    return vae
