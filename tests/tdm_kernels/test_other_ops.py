"""GroupNorm with SiLU, norm and rotation, and quantised attention on the CPU: meaning, checks, compile and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdm_kernels
from tdm_kernels import (
    BadArgument,
    Int8,
    KernelUnavailable,
    dispatch,
    group_norm_silu,
    joint_attention,
    qk_norm_rope,
    quantise_qk,
    quantise_values,
    quantised_attention,
)
from tdm_kernels.dispatch import MEASURED, VARIABLE
from tdm_kernels.testing import assert_close, cosine
from tdm_serve.models.families.zimage_denoiser import rotate
from tests.tdm_kernels.distributions import DISTRIBUTIONS, LEAST_COSINE, draw

BATCH, TOKENS, HEADS, CHANNELS = 2, 9, 3, 16


def generated(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pairs() -> list[Tensor]:
    """q, k, their weights, cos, sin."""
    angles = generated(TOKENS, CHANNELS // 2) * 3
    q, k = generated(2, BATCH, TOKENS, HEADS, CHANNELS)
    return [q, k, *generated(2, CHANNELS), angles.cos(), angles.sin()]


def test_public_names_are_sorted_and_resolve() -> None:
    assert list(tdm_kernels.__all__) == sorted(tdm_kernels.__all__)
    assert all(getattr(tdm_kernels, name) is not None for name in tdm_kernels.__all__)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_silu_is_torchs_two(layout: torch.memory_format) -> None:
    x, weight, bias = generated(2, 8, 5, 7).to(memory_format=layout), generated(8), generated(8)
    out = group_norm_silu(x, weight, bias, 4)
    torch.testing.assert_close(out, F.silu(F.group_norm(x, 4, weight, bias, 1e-6)), rtol=0, atol=0)
    assert out.stride() == x.stride()
    torch.library.opcheck(torch.ops.tdm.group_norm_silu.default, (x, weight, bias, 4, 1e-6))


def test_group_norm_silu_has_torchs_gradient() -> None:
    x = generated(1, 4, 3, 3).double().requires_grad_()
    weight, bias = generated(4).double(), generated(4).double()
    assert torch.autograd.gradcheck(lambda x: group_norm_silu(x, weight, bias, 2), (x,))


def test_qk_norm_rope_is_what_the_denoiser_does() -> None:
    """To the bit in float32, so pictures on a CPU do not change with it."""
    q, k, q_weight, k_weight, cos, sin = pairs()
    for mine, x, weight in zip(qk_norm_rope(*pairs(), eps=1e-5), (q, k), (q_weight, k_weight), strict=True):
        theirs = rotate(F.rms_norm(x, (CHANNELS,), weight, 1e-5), cos.unsqueeze(1), sin.unsqueeze(1))
        assert torch.equal(mine, theirs)


def test_both_ways_to_pair_are_one_under_reordering() -> None:
    q, k, _, _, cos, sin = pairs()
    order = torch.arange(CHANNELS).unflatten(0, (-1, 2)).T.flatten()  # even channels, then odd ones
    interleaved = qk_norm_rope(q, k, cos=cos, sin=sin)
    halves = qk_norm_rope(q[..., order], k[..., order], cos=cos, sin=sin, interleaved=False)
    for one, other in zip(interleaved, halves, strict=True):
        assert torch.equal(one[..., order], other)


def test_qk_norm_rope_without_work_returns_copies() -> None:
    q, k = pairs()[:2]
    for one, x in zip(qk_norm_rope(q, k), (q, k), strict=True):
        assert torch.equal(one, x)
        assert one.data_ptr() != x.data_ptr()
    torch.library.opcheck(torch.ops.tdm.qk_norm_rope.default, (q, k, None, None, None, None, 1e-6, True))
    torch.library.opcheck(torch.ops.tdm.qk_norm_rope.default, (*pairs(), 1e-6, False))


def test_qk_norm_rope_has_torchs_gradient() -> None:
    q, k, q_weight, k_weight, cos, sin = (x.double() for x in pairs())
    q.requires_grad_()
    turn = cos[:, :2].contiguous(), sin[:, :2].contiguous()

    def function(x: Tensor) -> Any:
        return qk_norm_rope(x, k[:1, :, :1, :4], q_weight[:4], k_weight[:4], *turn)

    assert torch.autograd.gradcheck(function, (q[:1, :, :1, :4],))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("values", ["bf16", "fp8"])
def test_quantised_attention_points_where_exact_attention_does(values: str, distribution: str) -> None:
    q, k, v = draw(distribution, 2, 2, 700, 64)
    kv_len = torch.tensor([700, 450], dtype=torch.int32)
    qk = quantise_qk(q.transpose(1, 2), k.transpose(1, 2), kv_len=kv_len)
    value, scale = quantise_values(v, kv_len) if values == "fp8" else (v, None)
    out = quantised_attention(qk, value, scale, kv_len)
    assert out.dtype == torch.bfloat16
    assert cosine(out, joint_attention(q.double(), k.double(), v.double(), kv_len)) >= LEAST_COSINE[values]


def test_smoothing_pays_where_keys_share_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw("biased keys", 1, 2, 500, 64)
    exact = joint_attention(q.double(), k.double(), v.double())

    def found() -> float:
        return cosine(quantised_attention(quantise_qk(q.transpose(1, 2), k.transpose(1, 2)), v), exact)

    smoothed = found()
    monkeypatch.setattr("tdm_kernels.norm_rope.naive.mean_key", lambda *_: torch.zeros(()))
    assert 1 - found() > 3 * (1 - smoothed)


def test_padding_may_hold_anything() -> None:
    q, k, v = (x.transpose(1, 2) for x in draw("random", 2, 2, 40, 64))
    kv_len = torch.tensor([40, 11], dtype=torch.int32)
    clean = quantised_attention(quantise_qk(q, k, kv_len=kv_len), *values_of(v, kv_len), kv_len)
    k[1, 11:], v[1, 11:] = float("nan"), float("inf")
    assert torch.equal(quantised_attention(quantise_qk(q, k, kv_len=kv_len), *values_of(v, kv_len), kv_len), clean)


def values_of(v: Tensor, kv_len: Tensor) -> tuple[Tensor, Tensor]:
    return quantise_values(v.transpose(1, 2), kv_len)


class Block(nn.Module):
    """Norm, rotation, quantisation and attention as a model would use them, and GroupNorm behind."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor) -> Tensor:
        q, k = qk_norm_rope(q, k)
        qk = quantise_qk(q, k, kv_len=kv_len)
        value, scale = quantise_values(v.transpose(1, 2), kv_len)
        out = quantised_attention(qk, value, scale, kv_len, dtype=torch.float32)
        return group_norm_silu(out, torch.ones(out.shape[1]), torch.zeros(out.shape[1]), 1)


def test_torch_compile_and_export_keep_the_operations() -> None:
    inputs = (*generated(3, 2, 10, 3, 64), torch.tensor([10, 4], dtype=torch.int32))
    eager = Block()(*inputs)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), eager)
    graph = torch.export.export(Block(), inputs).graph
    called = [str(node.target) for node in graph.nodes if str(node.target).startswith("tdm.")]
    names = ("qk_norm_rope", "quantise_qk", "quantised_attention", "group_norm_silu")
    assert called == [f"tdm.{name}.default" for name in names]


def integers(**changes: Tensor) -> Int8:
    q, k = pairs()[:2]
    return quantise_qk(q, k)._replace(**changes)


def values(**changes: Any) -> dict[str, Any]:
    return {"v": generated(BATCH, HEADS, TOKENS, CHANNELS), **changes}


WRONG: dict[str, Callable[[], Any]] = {
    "groups is 3; it must divide the 8 channels": lambda: group_norm_silu(*picture(), 3),
    "weight is float64, but x is float32": lambda: group_norm_silu(
        picture()[0], *(p.double() for p in picture()[1:]), 2
    ),
    r"bias has shape \(8, 1\); it needs 1 dimensions \(C\)": lambda: group_norm_silu(
        *picture()[:2], generated(8, 1), 2
    ),
    "q_weight and k_weight, and cos and sin, come both or not at all": lambda: qk_norm_rope(*pairs()[:3]),
    r"cos has shape \(9, 4\); in \(S, D / 2\), D / 2 must be 8": lambda: qk_norm_rope(
        *pairs()[:4], pairs()[4][:, :4], pairs()[5]
    ),
    "cos is bfloat16; allowed: float32 or float64": lambda: qk_norm_rope(
        *pairs()[:4], *(x.bfloat16() for x in pairs()[4:])
    ),
    r"k has shape \(2, 8, 3, 16\); in \(B, S, H, D\), S must be 9": lambda: qk_norm_rope(pairs()[0], pairs()[1][:, 1:]),
    "kv_len has values from 0 to 9; allowed: 1 to 9": lambda: quantise_qk(
        *pairs(), torch.tensor([0, 9], dtype=torch.int32)
    ),
    "q is float32; allowed: int8": lambda: quantised_attention(integers(q=generated(2, 3, 9, 16)), **values()),
    r"k_scale has shape \(2, 3\); it needs 3 dimensions \(B, H, blocks\)": lambda: quantised_attention(
        integers(k_scale=generated(2, 3)), **values()
    ),
    "take both from quantise_qk": lambda: quantised_attention(integers(q=integers().q.mT.contiguous().mT), **values()),
    "v is float8_e4m3fn and v_scale is missing": lambda: quantised_attention(
        integers(), **values(v=quantise_values(values()["v"])[0])
    ),
    "v is float32 and v_scale is given": lambda: quantised_attention(integers(), **values(v_scale=generated(2, 3, 16))),
    "stride -2 must be 1, so take them from quantise_values": lambda: quantised_attention(
        integers(), values()["v"].to(torch.float8_e4m3fn), generated(2, 3, 16)
    ),
    "dtype is float64; allowed: float16, bfloat16 or float32": lambda: quantised_attention(
        integers(), **values(dtype=torch.float64)
    ),
}


def picture() -> list[Tensor]:
    return [generated(2, 8, 5, 7), generated(8), generated(8)]


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named_with_value_and_allowed_set(message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        WRONG[message]()


def test_explicit_triton_on_a_cpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = f"{VARIABLE}=triton cannot run group_norm_silu: the tensors are on cpu, and it needs a CUDA device"
    with pytest.raises(KernelUnavailable, match=why):
        group_norm_silu(*picture(), 2)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(KernelUnavailable, match="'cuda'; allowed: auto, triton, torch"):
        group_norm_silu(*picture(), 2)


def test_the_committed_measurements_name_known_operations() -> None:
    known = {"group_norm_silu", "qk_norm_rope", "quantise_qk", "quantised_attention", "quantised_attention (tma)"}
    assert {row["operation"] for row in json.loads(MEASURED.read_text())["faster"]} <= known


def test_auto_takes_triton_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCard(torch.Tensor):
        device = torch.device("cuda", 0)

    x = torch.empty(1, device="meta").as_subclass(OnCard)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(dispatch, "_measured", lambda: {("qk_norm_rope", "NVIDIA H200")})
    assert dispatch.takes_triton("qk_norm_rope", x, None)
    assert not dispatch.takes_triton("qk_norm_rope", x, "too wide")
    assert not dispatch.takes_triton("group_norm_silu", x, None)
    dispatch._say_once.cache_clear()


def test_assert_close_tells_how_far_and_finds_what_is_no_number() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    assert_close(torch.ones(4), exact)
    with pytest.raises(
        AssertionError, match=r"relative error 0\.5 above 1e-06; largest difference 1, mean 0.25, 0 of 4"
    ):
        assert_close(torch.tensor([1.0, 1.0, 1.0, 2.0]), exact)
    with pytest.raises(AssertionError, match="1 of 4 values are NaN"):
        assert_close(torch.tensor([1.0, 1.0, 1.0, float("nan")]), exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), exact)
