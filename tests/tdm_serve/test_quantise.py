"""fp8 weights: which layers, where they cannot be had, and, in processes that have torchao, that they work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tdm_serve import Pipeline
from tdm_serve.errors import BackendUnavailable, ConfigError, MissingExtra
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.quantise import KEPT, check_fp8, is_quantised, linears
from tests.tdm_serve import fp8_checks

APART = Path(sys.prefix) / "fp8"  # where `make test` puts torchao
Run = Callable[[str], str]

TAKEN = {
    "zimage": ["layers.0.attention.to_q", "noise_refiner.1.feed_forward.w2", "blocks.3.qkv", "image_blocks.0.gate_up"],
    "sd3": ["transformer_blocks.3.attn.to_out.0", "transformer_blocks.0.ff_context.net.2", "blocks.3.image.qkv.base"],
    "sd15": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.attentions.0.ff.net.2"],
    "pixart": ["transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.ff.net.0.proj"],
}
LEFT = {
    "zimage": [
        "cap_embedder.1",
        "t_embedder.mlp.0",
        "layers.0.adaLN_modulation.0",
        "all_final_layer.2-1.linear",
        "time.mlp.2",
    ],
    "sd3": ["proj_out", "out", "context_embedder", "transformer_blocks.0.norm1.linear", "blocks.0.text_modulation"],
    "sd15": ["time_embedding.linear_1", "unet.mid_block.attentions.0.attn2.to_k", "mid_block.resnets.0.time_emb_proj"],
    "pixart": ["proj_out", "transformer.adaln_single.linear", "caption_projection.linear_1", "x.attn2.to_v"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers(family: str) -> None:
    assert all(is_quantised(family, name, (64, 32)) for name in TAKEN[family])
    assert not any(is_quantised(family, name, (64, 32)) for name in LEFT[family])
    assert not is_quantised(family, TAKEN[family][0], (64, 40)), "fp8 products come in sixteens"
    assert not is_quantised(family, TAKEN[family][0], (64,)), "a norm is no linear"
    assert set(KEPT) == set(FAMILIES)


@pytest.mark.parametrize("name", fp8_checks.TINY)
def test_both_spellings_mean_the_same_layers(name: str) -> None:
    """Sizes are reckoned from diffusers' names, layers are taken by those of the denoisers here."""
    from tdm_serve.models.random_weights import random_specs
    from tdm_serve.models.sizes import sizes_of

    with random_specs([name]) as [spec]:
        reckoned = sizes_of(spec.base, spec.family, random=True).network.fp8_elements
    denoiser = Pipeline.from_pretrained(name, random_weights=True).engine.model.denoiser
    assert reckoned == sum(one.weight.numel() for _, one in linears(denoiser, spec.family)) > 0


def test_without_torchao() -> None:
    """As in this process."""
    with pytest.raises(MissingExtra, match=r"pip install 'tdm-serve\[fp8\]'"):
        Pipeline.from_pretrained("default", quantise="fp8")


def test_where_the_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such GPU is at hand, so its answers stand in for it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _device: "A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (8, 0))
    with pytest.raises(BackendUnavailable, match=r"compute capability 8.9 or later, and A100 has 8.0"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (9, 0))
    check_fp8(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ConfigError, match="needs dtype bfloat16; dtype is float16"):
        check_fp8(torch.device("cuda"), torch.float16)


@pytest.fixture
def with_torchao(environment: dict[str, str], root: Path) -> Run:
    if not APART.is_dir():
        pytest.skip("needs torchao in a folder of its own, which `make test` makes")

    def run(check: str) -> str:
        paths = os.pathsep.join((str(APART), environment["PYTHONPATH"]))
        command = [sys.executable, str(root / "tests" / "tdm_serve" / "fp8_checks.py"), check]
        done = subprocess.run(
            command, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("check", ["families", "default"])
def test_networks_run_with_fp8_weights(with_torchao: Run, check: str) -> None:
    with_torchao(check)


@pytest.mark.slow
def test_bench_reports_the_error(with_torchao: Run) -> None:
    printed = with_torchao("bench")
    error = json.loads(printed.splitlines()[-1])["fp8_relative_error"]
    assert 0 < error < fp8_checks.LARGEST_ERROR
    assert f"fp8 changes the network's output by {error:.2%}" in printed


@pytest.mark.gpu
def test_fp8_on_a_gpu() -> None:
    plain, fp8 = (
        Pipeline.from_pretrained("zimage-tdm-r1:tiny", device="cuda", random_weights=True, quantise=quantise)
        for quantise in ("none", "fp8")
    )
    assert 1e-4 < fp8_checks.relative_error(fp8_checks.of(fp8), fp8_checks.of(plain)) < fp8_checks.LARGEST_ERROR
    assert all(
        isinstance(one, nn.Linear) and one.weight.is_cuda for _, one in linears(fp8.engine.model.denoiser, "zimage")
    )
