"""benchmarks/roofline.py: its counts against sums by hand, and its shares against a time that is known."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdm_serve.core import Request
from tdm_serve.engine import Engine


@pytest.fixture
def roofline(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return import_module("roofline")


def test_a_small_network_costs_what_a_sum_by_hand_says(roofline: ModuleType) -> None:
    linear, convolution = nn.Linear(8, 16, bias=False), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    x, picture = torch.randn(5, 8), torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        product = roofline.counted(lambda: F.silu(linear(x)))
        convolved = roofline.counted(lambda: convolution(picture))
    assert product.flops == 2 * 5 * 8 * 16
    assert product.bytes == 4 * (5 * 8 + 8 * 16 + 5 * 16)  # SiLU is thought fused
    assert convolved.flops == 2 * 2 * 6 * 6 * 4 * 3 * 9
    assert convolved.bytes == 4 * (2 * 3 * 36 + 4 * 3 * 9 + 2 * 4 * 36)


def test_attention_is_two_products(roofline: ModuleType) -> None:
    from tdm_kernels import joint_attention

    q, k = torch.randn(2, 3, 64, 32), torch.randn(2, 3, 96, 32)
    with torch.inference_mode():
        own = roofline.counted(lambda: joint_attention(q, k, k))
        stock = roofline.counted(lambda: F.scaled_dot_product_attention(q, k, k))
    assert own.flops == stock.flops == 4 * 2 * 3 * 64 * 96 * 32


def test_an_evaluation_of_z_image_costs_its_closed_form(roofline: ModuleType) -> None:
    engine = Engine.load("default", device="cpu", backend="eager", cache_mb=0)
    costs = roofline.stage_costs(engine, [Request("two red circles", 1, engine.info.width, engine.info.height)])
    denoiser = engine.model.denoiser
    block = denoiser.blocks[0]
    width, feed = block.down.weight.shape
    image = engine.info.width * engine.info.height // (engine.model.factor * 2) ** 2
    joint = image + 32  # the prompt's tokens, padded

    def blocks(count: int, tokens: int) -> int:
        return count * (2 * tokens * (4 * width**2 + 3 * width * feed) + 4 * tokens**2 * width)

    ends = 2 * 2 * image * width * engine.model.channels * 4  # 2x2 patches into tokens, and out again
    expected = blocks(len(denoiser.image_blocks), image) + blocks(len(denoiser.blocks), joint) + ends
    assert costs["evaluation"].flops == expected
    assert costs["denoise"].flops == engine.info.nfe * expected
    assert costs["text"].flops > 0 and costs["decode"].flops > 0


def test_the_share_is_that_of_the_binding_ceiling(roofline: ModuleType) -> None:
    found = {"matmul_gflops": 100.0, "copy_gbps": 10.0}
    costs = {"denoise": roofline.Cost(1e9, 1e6), "decode": roofline.Cost(1e6, 1e8), "other": roofline.Cost(1, 1)}
    rows = roofline.shares(costs, {"denoise": 20.0, "decode": 40.0}, found)
    assert rows["denoise"] == {"flops": 1e9, "bytes": 1e6, "share": 0.5, "bound": "matmul"}
    assert (rows["decode"]["share"], rows["decode"]["bound"]) == (0.25, "copy") and set(rows) == {"denoise", "decode"}
    assert "50.0% of what matmul allows" in roofline.table(rows, found)


def test_ceilings_are_measured(roofline: ModuleType) -> None:
    found = roofline.ceilings("cpu", torch.float32)
    assert found["matmul_gflops"] > 0.5 and found["copy_gbps"] > 0.05
