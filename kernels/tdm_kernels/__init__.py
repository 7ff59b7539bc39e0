"""Triton kernels for the hot operations of few-step image transformers.

Each operation is a sub-package with `naive.py`, the definition of correct in plain torch, the kernels in `triton_*.py`,
which are imported on their first launch, and `ops.py`, the public `torch.library` operation that checks its arguments
and chooses between them. `docs/kernels.md` says what is proven how.
"""

from tdm_kernels.attention import joint_attention, joint_attention_lse
from tdm_kernels.attention.choose import check_choices
from tdm_kernels.errors import BadArgument, KernelError, KernelUnavailable
from tdm_kernels.group_norm import group_norm_silu
from tdm_kernels.norm_rope import Int8, qk_norm_rope, quantise_qk
from tdm_kernels.quantised import quantise_values, quantised_attention

__all__ = [
    "BadArgument",
    "Int8",
    "KernelError",
    "KernelUnavailable",
    "check_choices",
    "group_norm_silu",
    "joint_attention",
    "joint_attention_lse",
    "qk_norm_rope",
    "quantise_qk",
    "quantise_values",
    "quantised_attention",
]
