"""SD3's and SD3.5's dense denoiser against diffusers' class on random weights: ragged prompts, odd sizes, batches."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from tdm_serve.models.families.sd3_denoiser import SD3Denoiser

SD3, SD35 = (), (0, 1)  # which blocks have dual attention


def transformer(dual: tuple[int, ...], seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=24,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dual", [SD3, SD35])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width", "tokens"), [(16, 16, 9), (6, 10, 1), (2, 2, 33), (22, 4, 20)])
def test_equals_diffusers(dual: tuple[int, ...], batch: int, height: int, width: int, tokens: int) -> None:
    model = transformer(dual, height + tokens)
    latents, text, pooled = torch.randn(batch, 4, height, width), torch.randn(batch, tokens, 20), torch.randn(batch, 12)
    time = torch.linspace(999, 1, batch)
    expected = model(latents, text, pooled, time, return_dict=False)[0]
    for denoiser in (SD3Denoiser(model), SD3Denoiser(model).pack()):
        refined = denoiser.refine_text(text, pooled)
        got = denoiser(latents, denoiser.modulation(time, refined), refined)
        assert relative(got, expected) <= 1e-5


def test_parameters_are_the_transformers_own() -> None:
    """Training and adapters change the one and are seen by the other."""
    model = transformer(SD35)
    denoiser = SD3Denoiser(model)
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(denoiser.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("packed", [True, False])
def test_the_forward_is_one_graph(packed: bool) -> None:
    denoiser = SD3Denoiser(transformer(SD35))
    denoiser = denoiser.pack() if packed else denoiser
    latents, text = torch.randn(2, 4, 8, 8), denoiser.refine_text(torch.randn(2, 5, 20), torch.randn(2, 12))
    table = denoiser.modulation(torch.tensor([900.0, 3.0]), text)
    expected = denoiser(latents, table, text)
    traced = torch.compile(denoiser, dynamic=False, fullgraph=True, backend="eager")
    assert torch.equal(traced(latents, table, text), expected)
