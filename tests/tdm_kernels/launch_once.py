"""Runs one kernel once, for a process of its own: one that hangs can be killed. See `main` for the arguments."""

from __future__ import annotations

import sys

import torch

from tdm_kernels import Int8
from tdm_kernels.attention.launch import launch
from tdm_kernels.attention.naive import joint_attention_lse
from tdm_kernels.norm_rope import launch as norm_rope
from tdm_kernels.quantised import naive
from tdm_kernels.quantised.launch import launch as launch_quantised
from tdm_kernels.testing import assert_close
from tests.tdm_kernels.distributions import draw


def attention(variant: str, head_dim: int) -> None:
    q, k, v = (x.cuda() for x in draw("random", 2, 3, 300, head_dim))
    kv_len = torch.tensor([300, 67], dtype=torch.int32, device="cuda")
    out, lse = launch(variant, q, k, v, kv_len, want_lse=True)
    torch.cuda.synchronize()
    exact, sums = joint_attention_lse(q.double(), k.double(), v.double(), kv_len)
    assert lse is not None
    assert_close(out, exact)
    torch.testing.assert_close(lse, sums, atol=1e-4, rtol=1e-4)


def quantised(loads: str, head_dim: int) -> None:
    q, k, v = (x.cuda() for x in draw("random", 2, 3, 300, head_dim))
    how = {"eps": 1e-6, "INTERLEAVED": True}
    keys, nothing = k.transpose(1, 2), (None, None)
    mean = norm_rope.key_mean(keys, None, nothing, None, **how)
    queries = norm_rope.to_int8(q.transpose(1, 2), None, nothing, None, None, 128, **how)
    qk = Int8(*queries, *norm_rope.to_int8(keys, None, nothing, mean, None, 64, **how))
    for value, scale, tolerance in ((v, None, 5e-3), (*naive.quantise_values(v, None), 4e-2)):
        out = launch_quantised("tma" if loads == "tma" else "pointer", qk, value, scale, None, torch.bfloat16)
        torch.cuda.synchronize()
        assert_close(out, naive.quantised_attention(qk, value, scale, None, torch.float32), tolerance)


def main() -> None:
    """`attention VARIANT HEAD_DIM` or `quantised LOADS HEAD_DIM`."""
    what, how, head_dim = sys.argv[1:]
    {"attention": attention, "quantised": quantised}[what](how, int(head_dim))


if __name__ == "__main__":
    main()
