"""The product's networks with the kernels on an NVIDIA GPU, beside plain torch. Apart, since they need diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdm_kernels.attention.choose import VARIABLE as ATTENTION
from tdm_kernels.dispatch import VARIABLE as KERNELS
from tdm_kernels.testing import cosine, relative_error
from tests.tdm_kernels.gpu_runs import needs_a_gpu

pytest.importorskip("diffusers", reason="the networks are diffusers'")

from tdm_serve.models.autoencoder import decode, laid_out, with_kernels
from tests.tdm_kernels.networks import autoencoder, sd35, velocity, zimage

pytestmark = needs_a_gpu()


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS, "triton")


def no_further(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Kernels round less often than plain layers, so they are as close to float32 as those, to a quarter."""
    assert relative_error(found, exact) <= 1.25 * relative_error(plain, exact)


@pytest.mark.parametrize("ragged", [False, True])
def test_zimage_calls_the_kernels(ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = velocity(zimage().cuda(), ragged=ragged)
    denoiser = zimage().to("cuda", torch.bfloat16)
    monkeypatch.setenv(ATTENTION, "sdpa")
    plain = velocity(denoiser, ragged=ragged)
    no_further(velocity(denoiser.use_kernels(), ragged=ragged), plain, exact)
    monkeypatch.setenv(ATTENTION, "triton")
    fused = velocity(denoiser, ragged=ragged)
    no_further(fused, plain, exact)
    if not ragged:
        compiled = torch.compile(denoiser.blocks[0], fullgraph=True)
        table = torch.rand(96, 1, 32, device="cuda")
        given = torch.randn(2, 96, 128, device="cuda").bfloat16(), (table.cos(), table.sin())
        given = (*given, torch.rand(2, 4, 1, 128, device="cuda").bfloat16())
        assert relative_error(compiled(*given), denoiser.blocks[0](*given)) <= 1e-2
    monkeypatch.setenv(ATTENTION, "quantised")
    found = velocity(denoiser.use_kernels(), ragged=ragged)
    assert cosine(found, exact) >= 0.999
    assert not torch.equal(found, fused)


def test_sd35_calls_the_kernels() -> None:
    denoiser, given = sd35()
    exact = denoiser(*given)
    denoiser.to("cuda", torch.bfloat16)
    narrow = [x.to("cuda", torch.bfloat16) for x in given]
    plain = denoiser(*narrow).cpu()
    no_further(denoiser.use_kernels()(*narrow).cpu(), plain, exact)


@pytest.mark.parametrize("channels", [(32, 64), (16, 48)])
def test_a_decoder_calls_the_kernels(channels: tuple[int, int]) -> None:
    vae = laid_out(autoencoder(channels))
    latents = torch.randn(2, 4, 24, 40).contiguous(memory_format=torch.channels_last)
    exact = decode(vae, latents)
    vae.to("cuda", torch.bfloat16)
    narrow = latents.to("cuda", torch.bfloat16)
    plain = decode(vae, narrow).cpu()
    no_further(decode(with_kernels(vae), narrow).cpu(), plain, exact)
