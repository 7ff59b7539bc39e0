"""The dense denoiser against diffusers' list-based transformer, in float64, on random weights and odd sizes."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser, padded_length


def random_transformer(seed: int) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval().requires_grad_(False)


def stock(model: ZImageTransformer2DModel, latents: torch.Tensor, sigma: float, text: torch.Tensor) -> torch.Tensor:
    """diffusers' own forward for one picture; it returns the negative velocity and counts time from the clean end."""
    time = torch.tensor([1.0 - sigma], dtype=torch.float64)
    return -model([latents.unsqueeze(1)], time, [text], return_dict=False)[0][0].squeeze(1)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (6, 10), (2, 2), (18, 4)])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33])
def test_equals_diffusers(height: int, width: int, tokens: int) -> None:
    model = random_transformer(height * width + tokens)
    sigma = float(torch.rand(()))
    latents = torch.randn(4, height, width, dtype=torch.float64)
    text = torch.randn(tokens, 20, dtype=torch.float64)
    expected = stock(model, latents, sigma, text)
    for denoiser in (ZImageDenoiser(model), ZImageDenoiser(model).pack()):
        padded = torch.nn.functional.pad(text, (0, 0, 0, padded_length(tokens) - tokens)).unsqueeze(0)
        refined = denoiser.refine_text(padded, torch.tensor([tokens]))
        got = denoiser(latents.unsqueeze(0), denoiser.modulation(torch.tensor([sigma], dtype=torch.float64)), refined)
        # rotary tables are float32 in diffusers, and rotation runs in float32 there
        assert (got[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_pictures_at_different_levels_share_a_forward() -> None:
    denoiser = ZImageDenoiser(random_transformer(3)).pack()
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.7, 0.1], dtype=torch.float64)
    text = denoiser.refine_text(torch.randn(3, 32, 20, dtype=torch.float64), torch.tensor([5, 32, 17]))
    together = denoiser(latents, denoiser.modulation(sigma), text)
    for i in range(3):
        alone = denoiser(latents[i : i + 1], denoiser.modulation(sigma[i : i + 1]), text[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-12)


def test_parameters_are_the_transformers_own() -> None:
    """Training and adapters change the one and are seen by the other."""
    model = random_transformer(4)
    denoiser = ZImageDenoiser(model)
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(denoiser.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("packed", [True, False])
def test_the_forward_is_one_graph(packed: bool) -> None:
    """No graph breaks once the rotary tables are there: what `compiled` and the trainer's `compile` rely on."""
    denoiser = ZImageDenoiser(random_transformer(5))
    denoiser = denoiser.pack() if packed else denoiser
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    modulation = denoiser.modulation(torch.tensor([0.9, 0.2], dtype=torch.float64))
    text = denoiser.refine_text(torch.randn(2, 32, 20, dtype=torch.float64), torch.tensor([5, 32]))
    expected = denoiser(latents, modulation, text)
    traced = torch.compile(denoiser, dynamic=False, fullgraph=True, backend="eager")
    assert torch.equal(traced(latents, modulation, text), expected)
