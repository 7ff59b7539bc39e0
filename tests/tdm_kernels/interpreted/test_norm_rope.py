"""Norm, rotation and quantisation of queries and keys against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdm_kernels import qk_norm_rope, quantise_qk
from tdm_kernels.norm_rope import naive
from tdm_kernels.testing import assert_close

TOKENS, HEADS = 70, 3


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_KERNELS", "triton")


def arguments(head_dim: int, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> list[Tensor]:
    """q and k as views of one packed projection, weights, cos and sin."""
    generator = torch.Generator().manual_seed(head_dim)
    packed = torch.randn(2, tokens, 3, HEADS, head_dim, generator=generator).to(dtype)
    weights = (torch.rand(2, head_dim, generator=generator) + 0.5).to(dtype)
    angles = torch.rand(tokens, head_dim // 2, generator=generator) * 6.3
    return [*packed.unbind(2)[:2], *weights, angles.cos(), angles.sin()]


def exact(q: Tensor, k: Tensor, *others: Tensor | None, interleaved: bool = True) -> tuple[Tensor, Tensor]:
    q_weight, k_weight, cos, sin = (None if x is None else x.double() for x in others)
    return (
        naive.norm_rope(q.double(), q_weight, cos, sin, 1e-6, interleaved),
        naive.norm_rope(k.double(), k_weight, cos, sin, 1e-6, interleaved),
    )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_both_ways_to_pair(head_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    given = arguments(head_dim, dtype)
    out = qk_norm_rope(*given, interleaved=interleaved)
    for one, wanted in zip(out, exact(*given, interleaved=interleaved), strict=True):
        assert_close(one, wanted)
        assert one.is_contiguous()


def test_norm_and_rotation_alone() -> None:
    q, k, q_weight, k_weight, cos, sin = arguments(64)
    cases = [(q_weight, k_weight, None, None), (None, None, cos, sin), (None, None, None, None)]
    for case in cases:
        for one, wanted in zip(qk_norm_rope(q, k, *case), exact(q, k, *case), strict=True):
            assert_close(one, wanted)


def each(turn: Tensor, samples: int = 2) -> Tensor:
    """A table for every sample: shifted by a token."""
    return torch.stack([turn.roll(sample, 0) for sample in range(samples)])


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_table_of_its_own_for_every_sample(interleaved: bool) -> None:
    """As ragged batches have them; exactly what each sample is alone with its table."""
    *given, cos, sin = arguments(64)
    out = qk_norm_rope(*given, each(cos), each(sin), interleaved=interleaved)
    integers = quantise_qk(*given, each(cos), each(sin), interleaved=interleaved)
    for sample in range(2):
        own = [x[sample : sample + 1] for x in given[:2]] + given[2:] + [cos.roll(sample, 0), sin.roll(sample, 0)]
        for one, wanted in zip(out, qk_norm_rope(*own, interleaved=interleaved), strict=True):
            assert torch.equal(one[sample : sample + 1], wanted)
        for one, wanted in zip(integers, quantise_qk(*own, interleaved=interleaved), strict=True):
            assert torch.equal(one[sample : sample + 1], wanted)
    for one, wanted in zip(out, exact(*given, each(cos), each(sin), interleaved=interleaved), strict=True):
        assert_close(one, wanted)


@pytest.mark.parametrize("tokens", [1, 11, 64, 129])
def test_odd_numbers_of_tokens(tokens: int) -> None:
    given = arguments(64, tokens=tokens)
    for one, wanted in zip(qk_norm_rope(*given), exact(*given), strict=True):
        assert_close(one, wanted)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (128, torch.bfloat16)])
def test_quantisation_is_the_definitions(
    head_dim: int, dtype: torch.dtype, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers may differ by one where float32 sums fall on the other side of a half, which is rare."""
    given, kv_len = arguments(head_dim, dtype), torch.tensor([TOKENS, 33], dtype=torch.int32)
    given[1][1, 33:] = float("nan")  # padding
    mine = quantise_qk(*given, kv_len, interleaved=interleaved)
    monkeypatch.setenv("TDM_SERVE_KERNELS", "torch")
    wanted = quantise_qk(*given, kv_len, interleaved=interleaved)
    for scale, definition in ((mine.q_scale, wanted.q_scale), (mine.k_scale, wanted.k_scale)):
        torch.testing.assert_close(scale, definition, rtol=1e-6, atol=0)
    for whole, definition in ((mine.q, wanted.q), (mine.k, wanted.k)):
        apart = (whole.int() - definition.int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 1e-3
    assert torch.equal(mine.k[1, :, 33:], torch.zeros_like(mine.k[1, :, 33:]))


def test_keys_lose_what_they_share() -> None:
    q, k = arguments(64)[:2]
    shifted = quantise_qk(q, k + 50.0)
    plain = quantise_qk(q, k)
    torch.testing.assert_close(shifted.k_scale, plain.k_scale, rtol=1e-3, atol=0)
    assert (shifted.k.int() - plain.k.int()).abs().max() <= 1


def test_public_operations_are_sound() -> None:
    given = arguments(64, torch.bfloat16)
    torch.library.opcheck(torch.ops.tdm.qk_norm_rope.default, (*given, 1e-6, True))
    kv_len = torch.tensor([5, TOKENS], dtype=torch.int32)
    torch.library.opcheck(torch.ops.tdm.quantise_qk.default, (*given, kv_len, 1e-6, True))
