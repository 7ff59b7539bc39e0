"""Quantised attention in Triton's interpreter: against its definition, and against exact attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdm_kernels import Int8, quantise_qk, quantise_values, quantised_attention
from tdm_kernels.attention import naive as plain
from tdm_kernels.quantised import naive
from tdm_kernels.quantised.launch import Loads, launch
from tdm_kernels.testing import assert_close, cosine
from tests.tdm_kernels.distributions import DISTRIBUTIONS, LEAST_COSINE, draw

LOADS: tuple[Loads, ...] = ("pointer", "tma")
# Of the weights' rounding: half of the last bit of bfloat16 and of fp8's 3 bits, spread evenly, and averaged.
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TOLERANCE = {"bf16": 5e-3, "fp8": 4e-2}


def prepared(values: str, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> tuple[Int8, Tensor, Tensor | None]:
    """Quantised tensors of q, k, v (B, H, S, D)."""
    qk = quantise_qk(q.transpose(1, 2), k.transpose(1, 2), kv_len=kv_len)
    return (qk, *quantise_values(v, kv_len)) if values == "fp8" else (qk, v, None)


def first(qk: Int8, lines: int) -> Int8:
    """With fewer queries."""
    return qk._replace(q=qk.q[:, :, :lines].contiguous(), q_scale=qk.q_scale[:, :, : -(-lines // 128)].contiguous())


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("head_dim", [pytest.param(64, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize("values", ["bf16", "fp8"])
def test_kernel_is_the_definition(values: str, head_dim: int, loads: Loads) -> None:
    q, k, v = draw("random", 2, 2, 140, head_dim)
    kv_len = lengths(140, 67)
    k[1, :, 67:] = float("nan")
    v[1, :, 67:] = float("nan")
    qk, value, scale = prepared(values, q, k, v, kv_len)
    qk = first(qk, 130)
    out = launch(loads, qk, value, scale, kv_len, torch.bfloat16)
    assert_close(out, naive.quantised_attention(qk, value, scale, kv_len, torch.float32), TOLERANCE[values])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("loads", ["pointer", pytest.param("tma", marks=pytest.mark.slow)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("values", ["bf16", "fp8"])
def test_results_point_where_exact_ones_do(values: str, distribution: str, loads: Loads) -> None:
    q, k, v = draw(distribution, 1, 2, 320, 64)
    qk, value, scale = prepared(values, q, k, v, None)
    out = launch(loads, qk, value, scale, None, torch.bfloat16)
    assert cosine(out, plain.joint_attention(q.double(), k.double(), v.double())) >= LEAST_COSINE[values]


@pytest.mark.slow
@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("values", ["bf16", "fp8"])
def test_every_length_from_one_to_full(values: str, loads: Loads) -> None:
    keys = 68
    q, k, v = draw("random", keys, 1, keys, 64)
    kv_len = lengths(*range(1, keys + 1))
    qk, value, scale = prepared(values, q, k, v, kv_len)
    qk = first(qk, 2)
    out = launch(loads, qk, value, scale, kv_len, torch.bfloat16)
    assert_close(out, naive.quantised_attention(qk, value, scale, kv_len, torch.float32), TOLERANCE[values])


def test_public_operation_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_KERNELS", "triton")
    q, k, v = draw("random", 1, 2, 20, 64)
    for values in ("bf16", "fp8"):
        qk, value, scale = prepared(values, q, k, v, None)
        out = quantised_attention(qk, value, scale)
        assert torch.equal(out, launch("pointer", qk, value, scale, None, torch.bfloat16))
        arguments = (*qk, value, scale, None, torch.bfloat16)
        checks = ("test_faketensor",) if values == "fp8" else ALL  # the others multiply fp8, which torch cannot
        torch.library.opcheck(torch.ops.tdm.quantised_attention.default, arguments, test_utils=checks)
