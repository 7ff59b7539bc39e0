"""Triton's interpreter is wrong for bfloat16 and fp8 without our fixture. When these fail, delete it."""

from __future__ import annotations

import torch

from tdm_kernels.testing import relative_error
from tests.tdm_kernels.interpreted.repaired_interpreter import repaired_interpreter
from tests.tdm_kernels.interpreted.triton_samples import elementwise, narrow, product

PLAIN_INTERPRETER = True
SIZE = 32


def dot_error() -> float:
    a, b = torch.randn(2, SIZE, SIZE).bfloat16().unbind()
    out = torch.empty(SIZE, SIZE)
    product[(1,)](a, b, out, SIZE=SIZE)
    return relative_error(out, a.double() @ b.double())


def test_products_of_bits_without_the_fixture() -> None:
    torch.manual_seed(0)
    assert not dot_error() < 1.0
    with repaired_interpreter():
        assert dot_error() < 1e-6
    assert not dot_error() < 1.0


def test_sums_and_comparisons_of_bits_without_the_fixture() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, SIZE).bfloat16().unbind()
    out, larger = torch.empty_like(a), torch.empty(SIZE, dtype=torch.int8)
    exact = -(a + b) * a  # torch rounds after each operation, as the hardware does
    elementwise[(1,)](a, b, out, larger, SIZE=SIZE)
    assert not torch.equal(out, exact)
    assert not torch.equal(larger.bool(), a > b)
    with repaired_interpreter():
        elementwise[(1,)](a, b, out, larger, SIZE=SIZE)
    assert torch.equal(out, exact)
    assert torch.equal(larger.bool(), a > b)


def test_casts_cut_without_the_fixture() -> None:
    torch.manual_seed(0)
    a = torch.cat((torch.randn(SIZE - 3), torch.tensor([float("inf"), -float("inf"), float("nan")])))
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    narrow[(1,)](a, out, SIZE=SIZE)
    assert not torch.equal(out[:-1], a.bfloat16()[:-1])
    with repaired_interpreter():
        narrow[(1,)](a, out, SIZE=SIZE)
    assert torch.equal(out[:-1], a.bfloat16()[:-1])
    assert out[-1].isnan()


def test_casts_to_fp8_lose_the_carry_without_the_fixture() -> None:
    a = torch.linspace(-500, 500, 1024)
    a[0] = 1.95
    out = torch.empty(1024, dtype=torch.float8_e4m3fn)
    exact = a.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    narrow[(1,)](a, out, SIZE=1024)
    assert (out[0].float(), exact[0]) == (1.0, 2.0)
    with repaired_interpreter():
        narrow[(1,)](a, out, SIZE=1024)
    assert torch.equal(out.float(), exact)
