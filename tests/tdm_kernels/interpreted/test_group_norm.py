"""GroupNorm with SiLU against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdm_kernels import group_norm_silu
from tdm_kernels.group_norm import naive
from tdm_kernels.group_norm.launch import PIXELS, launch
from tdm_kernels.testing import assert_close

EPS = 1e-6


def picture(batch: int, channels: int, height: int, width: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(channels + height)
    x = torch.randn(batch, channels, height, width, generator=generator) + mean
    return x.to(dtype).to(memory_format=torch.channels_last)


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    weight, bias = torch.randn(2, channels, generator=generator).to(dtype)
    return weight, bias


def check(x: Tensor, groups: int) -> None:
    weight, bias = affine(x.shape[1], x.dtype)
    out = launch(x, weight, bias, groups, EPS)
    assert_close(out, naive.group_norm_silu(x.double(), weight.double(), bias.double(), groups, EPS))
    assert out.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (96, 24), (256, 2), (64, 64), (96, 8), (30, 10)])
def test_groups_of_every_size(channels: int, groups: int, dtype: torch.dtype) -> None:
    check(picture(2, channels, 9, 13, dtype), groups)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (5, 13), (1, PIXELS + 1)])
def test_pictures_of_odd_sizes(height: int, width: int) -> None:
    check(picture(1, 32, height, width, torch.float32), 8)


def test_more_tiles_than_are_joined_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdm_kernels.group_norm.launch.TILES", 2)
    check(picture(2, 32, 20, 25, torch.float32), 4)


def test_a_mean_far_from_zero_does_not_cancel() -> None:
    """Squares summed without their mean would lose all digits: 3000 squared beside 1."""
    x = picture(1, 32, 12, 12, torch.float32, mean=3000.0)
    weight, bias = affine(32, torch.float32)
    exact = naive.group_norm_silu(x.double(), weight.double(), bias.double(), 8, EPS)
    assert_close(launch(x, weight, bias, 8, EPS), exact, 1e-3)  # float32 has 2e-4 between numbers at 3000


def test_public_operation_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_KERNELS", "triton")
    x = picture(1, 32, 5, 5, torch.bfloat16)
    weight, bias = affine(32, torch.bfloat16)
    assert torch.equal(group_norm_silu(x, weight, bias, 8), launch(x, weight, bias, 8, EPS))
    torch.library.opcheck(torch.ops.tdm.group_norm_silu.default, (x, weight, bias, 8, EPS))
