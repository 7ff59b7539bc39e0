"""The kernels on an NVIDIA GPU: `pytest -m gpu tests/tdm_kernels`. Hangs first, in processes that can be killed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdm_kernels import (
    BadArgument,
    group_norm_silu,
    joint_attention,
    joint_attention_lse,
    qk_norm_rope,
    quantise_qk,
    quantise_values,
    quantised_attention,
)
from tdm_kernels.attention import naive, variants
from tdm_kernels.attention.choose import VARIABLE as ATTENTION
from tdm_kernels.attention.launch import launch
from tdm_kernels.dispatch import VARIABLE as KERNELS
from tdm_kernels.group_norm import naive as group_norm
from tdm_kernels.norm_rope import naive as norm_rope
from tdm_kernels.testing import assert_close, cosine
from tests.tdm_kernels.distributions import DISTRIBUTIONS, LEAST_COSINE, draw
from tests.tdm_kernels.gpu_runs import fits, needs_a_gpu, once, skip_others
from tests.tdm_kernels.launch_once import RUNS

pytestmark = needs_a_gpu()

ALL = [(name, head_dim) for name, variant in variants.VARIANTS.items() for head_dim in variant.cards]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION, "triton")
    monkeypatch.setenv(KERNELS, "triton")


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_a_kernel_ends_and_is_right(run: tuple[str, ...], environment: dict[str, str]) -> None:
    """First of all, each in a process that can be killed: nothing behind it would be reached by a run that hangs."""
    skip_others(run)
    once(environment, run)


def tensors(batch: int, heads: int, lines: int, keys: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(batch, tokens, heads, head_dim) for tokens in (lines, keys, keys)]
    return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for shape in shapes]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("lines", "keys"), [(1, 1), (129, 65), (1000, 1333)])
@pytest.mark.parametrize(("name", "head_dim"), ALL)
def test_attention_of_odd_sizes(name: str, head_dim: int, lines: int, keys: int, dtype: torch.dtype) -> None:
    fits(name, head_dim)
    q, k, v = tensors(2, 4, lines, keys, head_dim, dtype)
    kv_len = int32(keys, max(1, keys // 3))
    for sample, length in enumerate(kv_len.tolist()):
        k[sample, :, length:], v[sample, :, length:] = float("nan"), float("nan")
    out, lse = launch(name, q, k, v, kv_len, want_lse=True)
    exact, sums = naive.joint_attention_lse(q.double(), k.double(), v.double(), kv_len)
    assert_close(out, exact)
    torch.testing.assert_close(lse, sums, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "cudnn", "sdpa"])
def test_backends_agree(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION, backend)
    q, k, v = tensors(2, 4, 256, 320, 128, torch.bfloat16)
    for kv_len in (None, int32(320, 100)):
        exact, _ = naive.joint_attention_lse(q.double(), k.double(), v.double(), kv_len)
        assert_close(joint_attention(q, k, v, kv_len), exact)


def test_debugging_checks_lengths_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(2, 1, 8, 8, 64, torch.bfloat16)
    monkeypatch.setenv("TDM_SERVE_DEBUG", "1")
    with pytest.raises(BadArgument, match="kv_len has values from 3 to 9; allowed: 1 to 8"):
        joint_attention(q, k, v, int32(3, 9))
    monkeypatch.setenv("TDM_SERVE_DEBUG", "0")
    assert joint_attention(q, k, v, int32(3, 9)).isfinite().all()  # clamped, not read beyond the keys
    with pytest.raises(BadArgument, match="kv_len is on cpu"):
        joint_attention(q, k, v, int32(3, 8).cpu())


def test_attention_compiles_and_replays() -> None:
    q, k, v = tensors(1, 2, 200, 200, 64, torch.bfloat16)
    compiled = torch.compile(joint_attention, fullgraph=True)
    assert torch.equal(compiled(q, k, v), joint_attention(q, k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = joint_attention_lse(q, k, v, int32(150))
    q.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, joint_attention_lse(q, k, v, int32(150))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "groups", "side"), [(128, 32, 257), (512, 32, 64), (96, 24, 31)])
def test_group_norm_silu(channels: int, groups: int, side: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, channels, side, side, device="cuda").add(5).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, device="cuda").to(dtype)
    exact = group_norm.group_norm_silu(x.double(), weight.double(), bias.double(), groups, 1e-6)
    assert_close(group_norm_silu(x, weight, bias, groups), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_qk_norm_rope(head_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 333, 3, 5, head_dim, device="cuda").to(dtype).unbind(2)[:2]
    weight = torch.rand(head_dim, device="cuda").to(dtype)
    angles = torch.rand(333, head_dim // 2, device="cuda") * 6.3
    turn = (angles.cos(), angles.sin())
    wide = (weight.double(), *(x.double() for x in turn))
    for out, x in zip(qk_norm_rope(q, k, weight, weight, *turn, interleaved=interleaved), (q, k), strict=True):
        assert_close(out, norm_rope.norm_rope(x.double(), *wide, 1e-6, interleaved))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("values", ["bf16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_quantised_attention(head_dim: int, values: str, distribution: str) -> None:
    if values == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8 products")
    q, k, v = (x.cuda() for x in draw(distribution, 2, 4, 2000, head_dim))
    kv_len = int32(2000, 1300)
    qk = quantise_qk(q.transpose(1, 2), k.transpose(1, 2), kv_len=kv_len)
    value, scale = quantise_values(v, kv_len) if values == "fp8" else (v, None)
    exact = naive.joint_attention(q.double(), k.double(), v.double(), kv_len)
    assert cosine(quantised_attention(qk, value, scale, kv_len), exact) >= LEAST_COSINE[values]


def test_operations_are_sound_on_the_device() -> None:
    q, k, v = (x.transpose(1, 2) for x in tensors(2, 2, 40, 40, 64, torch.bfloat16))  # (B, S, H, D)
    kv_len, weight = int32(40, 7), torch.ones(64, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(40, 32, device="cuda")
    rest = (weight, weight, angles.cos(), angles.sin())
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    picture = torch.randn(1, 32, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    affine = torch.ones(32, device="cuda")
    operations = torch.ops.tdm
    torch.library.opcheck(operations.joint_attention.default, (*heads, kv_len))
    torch.library.opcheck(operations.joint_attention_lse.default, (*heads, kv_len))
    torch.library.opcheck(operations.qk_norm_rope.default, (q, k, *rest, 1e-6, True))
    torch.library.opcheck(operations.quantise_qk.default, (q, k, *rest, kv_len, 1e-6, True))
    whole = quantise_qk(q, k, kv_len=kv_len)
    torch.library.opcheck(operations.quantised_attention.default, (*whole, heads[2], None, kv_len, torch.bfloat16))
    torch.library.opcheck(operations.group_norm_silu.default, (picture, affine, affine, 8, 1e-6))
