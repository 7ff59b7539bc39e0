"""Triton kernels for the hot operations of few-step image transformers.

Each operation is a sub-package with `naive.py`, the definition of correct in plain torch, the kernels in `triton_*.py`,
which are imported on their first launch, and `ops.py`, the public `torch.library` operation that checks its arguments
and chooses between them. `docs/kernels.md` says what is proven how.
"""

from tdm_kernels.attention import joint_attention, joint_attention_lse
from tdm_kernels.errors import BadArgument, KernelError, KernelUnavailable

__all__ = ["BadArgument", "KernelError", "KernelUnavailable", "joint_attention", "joint_attention_lse"]
