"""Joint attention of image and text tokens, with padding skipped instead of masked."""

from tdm_kernels.attention.ops import joint_attention, joint_attention_lse

__all__ = ["joint_attention", "joint_attention_lse"]
