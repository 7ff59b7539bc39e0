"""benchmarks/roofline.py: operations counted as by hand, and shares of the machine's ceilings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdm_kernels import joint_attention
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.models.families.zimage_denoiser import padded_length


@pytest.fixture
def roofline(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; once, because torch keeps what it registers."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("roofline")


def test_attention_counts_the_keys_that_are_there(roofline: Any) -> None:
    q, k = torch.randn(2, 3, 5, 64), torch.randn(2, 3, 7, 64)
    with torch.inference_mode():
        assert roofline.flops(lambda: joint_attention(q, k, k))[0] == 4 * 2 * 3 * 5 * 7 * 64
        lengths = torch.tensor([2, 6], dtype=torch.int32)
        assert roofline.flops(lambda: joint_attention(q, k, k, lengths))[0] == 4 * 3 * 5 * (2 + 6) * 64


def test_linears_and_convolutions(roofline: Any) -> None:
    linear, convolution = nn.Linear(8, 6), nn.Conv2d(3, 4, 3, padding=1)
    with torch.inference_mode():
        assert roofline.flops(lambda: linear(torch.randn(5, 8)))[0] == 2 * 5 * 8 * 6
        assert roofline.flops(lambda: convolution(torch.randn(2, 3, 8, 8)))[0] == 2 * 2 * 64 * 4 * 3 * 9
    both = nn.Sequential(linear, nn.Embedding(100, 7))
    assert roofline.weight_bytes(both) == 4 * (8 * 6 + 6)


def test_a_denoiser_by_hand(roofline: Any) -> None:
    """Linears once a token and step, two products an attention; what depends on the time alone is kept from before."""
    engine = Engine.load("default", device="cpu", dtype="float32", cache_mb=0)
    network: Any = engine.model.denoiser
    request = Request("two red circles", 1, 64, 96)
    image = 32  # 4 x 6 patches, filled up
    tokens = image + padded_length(engine.model.count(request.prompt))
    engine.generate([request])
    needed = roofline.work(engine, [request])

    def block(one: Any, length: int) -> int:
        weights = sum(layer.weight.numel() for layer in (one.qkv, one.out, one.gate_up, one.down))
        return 2 * length * weights + 4 * length * length * one.out.in_features

    blocks = sum(block(one, image) for one in network.image_blocks) + sum(block(one, tokens) for one in network.blocks)
    rest = needed["denoise"]["flops"] - 4 * blocks
    edges = 4 * 2 * image * (network.embed_image.weight.numel() + network.final.linear.weight.numel())
    assert 0 < rest <= edges  # the patches before they are filled up, into the network and out of it


def test_a_batch_computes_more_and_reads_the_same_weights(roofline: Any) -> None:
    engine = Engine.load("default", device="cpu", dtype="float32", cache_mb=0)
    requests = [Request(prompt, 1, 64, 96) for prompt in ("two red circles", "a white cross")]
    engine.generate(requests)
    one, two = roofline.work(engine, requests[:1]), roofline.work(engine, requests)
    assert two["denoise"]["flops"] == 2 * one["denoise"]["flops"]
    assert two["decode"]["flops"] == 2 * one["decode"]["flops"]
    assert one["denoise"]["bytes"] < two["denoise"]["bytes"] < 1.1 * one["denoise"]["bytes"]


def test_shares_name_what_bounds(roofline: Any) -> None:
    needed = {"denoise": {"flops": 10**9, "bytes": 10**6}, "decode": {"flops": 10**6, "bytes": 10**9}}
    found = roofline.shares(needed, {"flops": 1e11, "bytes": 1e10}, {"denoise": 20.0, "decode": 400.0})
    assert (found["denoise"]["bound"], found["denoise"]["share"]) == ("compute", 0.5)
    assert (found["decode"]["bound"], found["decode"]["share"]) == ("memory", 0.25)


def test_ceilings_of_this_machine(roofline: Any) -> None:
    best = roofline.ceilings(torch.device("cpu"), torch.float32)
    assert best["flops"] > 1e9 and best["bytes"] > 1e8
