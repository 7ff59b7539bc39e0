"""Queries, keys and values on which quantised attention is judged, and how close it has to come."""

from __future__ import annotations

import torch
from torch import Tensor

DISTRIBUTIONS = ("random", "clustered", "biased keys", "values with a mean")
LEAST_COSINE = {"bf16": 0.9998, "fp8": 0.999}


def draw(
    distribution: str, batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, S, D): normed to unit mean square as after a QK-norm, then made harder."""
    generator = torch.Generator().manual_seed(tokens + head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(3, batch, heads, tokens, head_dim)
    if distribution == "clustered":  # tokens of few objects, as in a picture
        centres = normal(batch, heads, 8, head_dim)
        chosen = torch.randint(8, (tokens,), generator=generator)
        q, k = 0.5 * q + centres[:, :, chosen], 0.5 * k + centres[:, :, chosen]
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    if distribution == "biased keys":  # a few channels far from zero in all keys
        k = k + 4.0 * normal(1, heads, 1, head_dim)
    if distribution == "values with a mean":
        v = v + 2.0
    return q.to(dtype), k.to(dtype), v.to(dtype)
