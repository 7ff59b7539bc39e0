"""Runs one kernel once, for a process of its own: one that hangs can be killed. `RUNS` lists all, likely hangs first.

.venv/bin/python -m tests.tdm_kernels.launch_once attention tma-128x128-s2 128
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from tdm_kernels import Int8
from tdm_kernels.attention.launch import launch
from tdm_kernels.attention.naive import joint_attention_lse
from tdm_kernels.attention.variants import VARIANTS
from tdm_kernels.group_norm import launch as group_norms
from tdm_kernels.group_norm.naive import group_norm_silu
from tdm_kernels.norm_rope import launch as norm_ropes
from tdm_kernels.norm_rope import naive as plain_norm_rope
from tdm_kernels.quantised import naive
from tdm_kernels.quantised.launch import launch as launch_quantised
from tdm_kernels.testing import assert_close
from tests.tdm_kernels.distributions import draw

EPS = 1e-6
# TMA first: nobody has run warp specialisation yet. Then what multiplies matrices, and what only streams.
_ATTENTION = [
    ("attention", name, str(head_dim))
    for loads in ("tma", "pointer")
    for name, variant in VARIANTS.items()
    for head_dim in variant.cards
    if variant.loads == loads
]
_QUANTISED = [("quantised", loads, head_dim) for loads in ("tma", "pointer") for head_dim in ("64", "128")]
_NORMS = [("norm_rope", pairing, head_dim) for pairing in ("pairs", "halves") for head_dim in ("64", "128")]
_GROUPS = [("group_norm", channels, groups) for channels, groups in (("128", "32"), ("512", "32"), ("96", "8"))]
RUNS = [*_ATTENTION, *_QUANTISED, *_NORMS, *_GROUPS]


def attention(variant: str, head_dim: str) -> None:
    q, k, v = (x.cuda() for x in draw("random", 2, 3, 300, int(head_dim)))
    kv_len = torch.tensor([300, 67], dtype=torch.int32, device="cuda")
    out, lse = launch(variant, q, k, v, kv_len, want_lse=True)
    torch.cuda.synchronize()
    exact, sums = joint_attention_lse(q.double(), k.double(), v.double(), kv_len)
    assert lse is not None
    assert_close(out, exact)
    torch.testing.assert_close(lse, sums, atol=1e-4, rtol=1e-4)


def quantised(loads: str, head_dim: str) -> None:
    """int8 queries and keys, then attention with 16-bit values and, on cards that multiply it, with fp8."""
    q, k, v = (x.cuda() for x in draw("random", 2, 3, 300, int(head_dim)))
    how = {"eps": EPS, "INTERLEAVED": True}
    keys, nothing = k.transpose(1, 2), (None, None)
    mean = norm_ropes.key_mean(keys, None, nothing, None, **how)
    queries = norm_ropes.to_int8(q.transpose(1, 2), None, nothing, None, None, 128, **how)
    qk = Int8(*queries, *norm_ropes.to_int8(keys, None, nothing, mean, None, 64, **how))
    cases: list[tuple[Tensor, Tensor | None, float]] = [(v, None, 5e-3)]
    if torch.cuda.get_device_capability() >= (8, 9):
        cases.append((*naive.quantise_values(v, None), 4e-2))
    for value, scale, tolerance in cases:
        out = launch_quantised("tma" if loads == "tma" else "pointer", qk, value, scale, None, torch.bfloat16)
        torch.cuda.synchronize()
        assert_close(out, naive.quantised_attention(qk, value, scale, None, torch.float32), tolerance)


def norm_rope(pairing: str, head_dim: str) -> None:
    """With one table, and with one for every sample."""
    size = int(head_dim)
    q, k = torch.randn(2, 75, 3, 5, size, device="cuda").bfloat16().unbind(2)[:2]
    weight = torch.rand(size, device="cuda").bfloat16()
    angles = torch.rand(2, 75, size // 2, device="cuda") * 6.3
    for own in (angles, angles[0]):
        turn = own.cos(), own.sin()
        out = norm_ropes.norm_rope(q, k, (weight, weight), turn, EPS, pairing == "pairs")
        torch.cuda.synchronize()
        wide = (weight.double(), *(x.double() for x in turn), EPS, pairing == "pairs")
        for one, x in zip(out, (q, k), strict=True):
            assert_close(one, plain_norm_rope.norm_rope(x.double(), *wide))


def group_norm(channels: str, groups: str) -> None:
    x = torch.randn(2, int(channels), 33, 47, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, int(channels), device="cuda").bfloat16()
    out = group_norms.launch(x, weight, bias, int(groups), EPS)
    torch.cuda.synchronize()
    assert_close(out, group_norm_silu(x.double(), weight.double(), bias.double(), int(groups), EPS))


def main() -> None:
    """One of `RUNS`."""
    what, *how = sys.argv[1:]
    {"attention": attention, "quantised": quantised, "norm_rope": norm_rope, "group_norm": group_norm}[what](*how)


if __name__ == "__main__":
    main()
