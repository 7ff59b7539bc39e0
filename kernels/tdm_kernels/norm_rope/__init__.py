"""RMS-norm of queries and keys and their rotary embedding in one, and their quantisation to int8 with it."""

from tdm_kernels.norm_rope.int8 import Int8, quantise_qk
from tdm_kernels.norm_rope.ops import qk_norm_rope

__all__ = ["Int8", "qk_norm_rope", "quantise_qk"]
