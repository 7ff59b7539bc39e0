"""The attention kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdm_kernels import joint_attention
from tdm_kernels.attention import naive
from tdm_kernels.attention.launch import launch
from tdm_kernels.testing import assert_close

POINTER, TMA = "pointer-128x64-w4-s3", "tma-128x64-s3"
LOADS = (POINTER, TMA)
SLOW = pytest.mark.slow
DTYPES = (torch.float32, pytest.param(torch.float16, marks=SLOW), torch.bfloat16)


def tensors(batch: int, heads: int, lines: int, keys: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the models make them: views of token-major memory."""
    generator = torch.Generator().manual_seed(lines * keys)
    shapes = [(batch, tokens, heads, head_dim) for tokens in (lines, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def exact(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return naive.joint_attention_lse(q.double(), k.double(), v.double(), kv_len)


def check(variant: str, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> None:
    out, lse = launch(variant, q, k, v, kv_len, want_lse=True)
    assert lse is not None
    wanted, sums = exact(q, k, v, kv_len)
    assert_close(out, wanted)
    torch.testing.assert_close(lse, sums, atol=2e-6, rtol=1e-6)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("variant", LOADS)
def test_ragged_batches_of_odd_sizes(variant: str, head_dim: int, dtype: torch.dtype) -> None:
    check(variant, *tensors(2, 2, 131, 150, head_dim, dtype), kv_len=lengths(150, 67))


@pytest.mark.parametrize("variant", [POINTER, pytest.param(TMA, marks=SLOW)])
def test_every_length_from_one_to_full(variant: str) -> None:
    keys = 70
    check(variant, *tensors(keys, 1, 3, keys, 64, torch.float32), kv_len=lengths(*range(1, keys + 1)))


@pytest.mark.parametrize(("lines", "keys"), [(1, 1), (1, 64), (128, 128), (129, 65), (7, 63), (64, 200)])
@pytest.mark.parametrize("variant", LOADS)
def test_without_lengths(variant: str, lines: int, keys: int) -> None:
    check(variant, *tensors(1, 3, lines, keys, 64, torch.float32))


@pytest.mark.parametrize("variant", LOADS)
def test_padding_may_hold_anything(variant: str) -> None:
    q, k, v = tensors(2, 2, 33, 90, 64, torch.bfloat16)
    kv_len = lengths(70, 20)
    clean = launch(variant, q, k, v, kv_len, want_lse=True)
    for sample, length in enumerate(kv_len.tolist()):
        k[sample, :, length:] = float("nan")
        v[sample, :, length:] = float("inf")
    poisoned = launch(variant, q, k, v, kv_len, want_lse=True)
    for one, other in zip(clean, poisoned, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", LOADS)
def test_a_sample_does_not_depend_on_its_company(variant: str) -> None:
    q, k, v = tensors(3, 2, 40, 130, 64, torch.bfloat16)
    kv_len = lengths(130, 7, 65)
    together, _ = launch(variant, q, k, v, kv_len, want_lse=False)
    for i, length in enumerate(kv_len.tolist()):
        alone, _ = launch(
            variant, q[i : i + 1], k[i : i + 1, :, :length], v[i : i + 1, :, :length], None, want_lse=False
        )
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("variant", LOADS)
def test_a_sample_without_keys_is_zero(variant: str) -> None:
    q, k, v = tensors(2, 1, 5, 9, 64, torch.float32)
    out, lse = launch(variant, q, k, v, lengths(0, 9), want_lse=True)
    assert lse is not None
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("variant", LOADS)
def test_a_length_beyond_the_keys_reads_nothing_beyond_them(variant: str) -> None:
    q, k, v = tensors(1, 1, 5, 9, 64, torch.float32)
    assert_close(launch(variant, q, k, v, lengths(1000), want_lse=False)[0], exact(q, k, v)[0])


@pytest.mark.parametrize("variant", LOADS)
def test_large_scores_do_not_overflow(variant: str) -> None:
    q, k, v = tensors(1, 2, 20, 80, 64, torch.float32)
    q, k = q * 60, k * 60
    out, lse = launch(variant, q, k, v, None, want_lse=True)
    wanted, sums = exact(q, k, v)
    assert lse is not None
    assert_close(out, wanted, 1e-3)  # float32 scores of several thousand are good to a thousandth in the exponent
    assert_close(lse, sums)


def test_any_layout_with_contiguous_heads() -> None:
    """A packed projection (B, S, 3, H, D), head-major memory, and one head shared by all."""
    packed = torch.randn(2, 50, 3, 4, 64)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    for variant in LOADS:
        check(variant, q, k, v)
        check(variant, q.contiguous(), k.contiguous(), v)
        check(variant, q, k[:, :1].expand_as(k), v[:, :1].expand_as(v))


def test_parts_of_the_keys_join_by_their_sums() -> None:
    q, k, v = tensors(1, 2, 30, 100, 64, torch.float32)
    whole, sums = exact(q, k, v)
    parts = [launch(POINTER, q, k[:, :, s], v[:, :, s], None, want_lse=True) for s in (slice(0, 41), slice(41, None))]
    lse = torch.stack([part for _, part in parts if part is not None])
    joint = lse.logsumexp(0)
    out = sum((out * (part - joint).exp().unsqueeze(-1) for out, part in parts if part is not None), q.new_zeros(()))
    torch.testing.assert_close(joint, sums, atol=2e-6, rtol=1e-6)
    assert_close(out, whole)


def test_public_operation_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_ATTENTION", "triton")
    q, k, v = tensors(2, 1, 10, 20, 64, torch.bfloat16)
    out = joint_attention(q, k, v, lengths(20, 3))
    assert torch.equal(out, launch(POINTER, q, k, v, lengths(20, 3), want_lse=False)[0])
    torch.library.opcheck(torch.ops.tdm.joint_attention.default, (q, k, v, lengths(20, 3)))
    torch.library.opcheck(torch.ops.tdm.joint_attention_lse.default, (q, k, v, None))
