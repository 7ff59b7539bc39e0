"""GroupNorm and SiLU in one, for channels-last pictures of a VAE decoder."""

from tdm_kernels.group_norm.ops import group_norm_silu

__all__ = ["group_norm_silu"]
