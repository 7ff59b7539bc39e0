"""Comparing a kernel with an exact result: what tests and benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative, of the whole tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, in float64; NaN where anything is NaN."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def cosine(actual: Tensor, exact: Tensor) -> float:
    """Cosine of the angle between the two as vectors."""
    return float(torch.nn.functional.cosine_similarity(actual.double().flatten(), exact.double().flatten(), dim=0))


def assert_close(actual: Tensor, exact: Tensor, tolerance: float | None = None) -> None:
    """Fails where the relative error is above `tolerance`, by default that of `actual`'s dtype, or anything is NaN."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    tolerance = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, exact)
    if not error <= tolerance:  # a NaN is not
        apart = (actual.double() - exact.double()).abs().nan_to_num()
        bad = int(actual.isnan().sum())
        raise AssertionError(
            f"relative error {error:.3g} above {tolerance:g}; largest difference {float(apart.max()):.3g}, "
            f"mean {float(apart.mean()):.3g}, {bad} of {actual.numel()} values are NaN"
        )
