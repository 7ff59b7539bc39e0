"""Fusing LoRA files, against PEFT through diffusers, with alpha different from the rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from tdm_finetune.roles import ADAPTER_FILE, Role, Roles
from tdm_finetune.trainee import Conditioning, Trainee
from tdm_finetune.zimage import VelocityNet, linears
from tdm_serve.models.adapters import fuse_adapters
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.lora import read_lora
from tdm_serve.models.spec import Adapter


def transformer() -> ZImageTransformer2DModel:
    torch.manual_seed(1)
    return ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
        axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip


def output(model: ZImageTransformer2DModel) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    latents, text = torch.randn(4, 1, 8, 8, generator=random), torch.randn(9, 20, generator=random)
    with torch.no_grad():
        return model([latents], torch.tensor([0.3]), [text], return_dict=False)[0][0]


def new_role(adapter: Path | None = None) -> Role:
    """Of our trainer, for rank 4 and alpha 10, on as much of a trainee as roles need."""
    model = transformer()
    trainee = SimpleNamespace(net=VelocityNet(ZImageDenoiser(model)), linears=lambda: linears(model))
    return Roles(cast(Trainee, trainee), 4, 10.0).new(torch.Generator(), adapter)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A trained-looking adapter of rank 4 and alpha 10, written by our trainer."""
    role = new_role()
    for parameter in role.parameters:
        torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(3))
    role.save(tmp_path)
    return tmp_path / ADAPTER_FILE


def test_fusing_equals_stock_diffusers(adapter: Path) -> None:
    stock, ours = transformer(), transformer()
    state, metadata = ZImagePipeline.lora_state_dict(str(adapter), return_lora_metadata=True)
    ZImagePipeline.load_lora_into_transformer(state, stock, metadata=metadata)
    assert fuse_adapters(ours, (Adapter(adapter),)) == len(linears(ours)) == 28
    assert torch.allclose(output(ours), output(stock), atol=1e-5)
    assert not torch.allclose(output(ours), output(transformer()), atol=1e-2)


def test_fusing_equals_the_trainers_role(adapter: Path) -> None:
    random = torch.Generator().manual_seed(2)
    text = torch.randn(2, 32, 20, generator=random), torch.tensor([9, 32])
    latents, sigma = torch.randn(2, 4, 8, 8, generator=random), torch.tensor([0.3, 0.9])
    conditioning: Conditioning = text
    fused = transformer()
    fuse_adapters(fused, (Adapter(adapter),))
    with torch.no_grad():
        served = VelocityNet(ZImageDenoiser(fused))(latents, sigma, *conditioning)
        trained = new_role(adapter)(latents, sigma, conditioning)
        assert not torch.allclose(new_role()(latents, sigma, conditioning), served, atol=1e-2)
    assert torch.allclose(trained, served, atol=1e-5)
    assert {delta.scale for delta in read_lora(adapter).modules.values()} == {2.5}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two are what this is about
def test_several_adapters_with_scales_equal_peft(tmp_path: Path) -> None:
    """PEFT's own sum of two active adapters, alphas different from the rank."""
    model, given = transformer(), []
    for name, targets, scale in (("a", ["to_q", "w1"], 0.125), ("b", ["to_q", "to_v"], -1.5)):
        torch.manual_seed(len(given))
        model.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False), name)
        model.save_lora_adapter(tmp_path / name, adapter_name=name)
        given.append(Adapter(tmp_path / name, scale))
    model.set_adapters(["a", "b"], [one.scale for one in given])
    ours = transformer()
    assert fuse_adapters(ours, given) == len(
        [name for name, _ in ours.named_modules() if name.endswith(("to_q", "to_v", "w1"))]
    )
    assert torch.allclose(output(ours), output(model), atol=1e-4)
    assert not torch.allclose(output(ours), output(transformer()), atol=1e-2)


def test_no_adapter_changes_nothing() -> None:
    ours = transformer()
    assert fuse_adapters(ours, ()) == 0
    assert torch.equal(output(ours), output(transformer()))


def test_what_the_user_must_know_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformer()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False), "x")
    save_file(
        {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model, adapter_name="x").items()},
        tmp_path / "a.safetensors",
    )
    ours = transformer()
    fuse_adapters(ours, (Adapter(tmp_path / "a.safetensors"),))
    assert torch.allclose(output(ours), output(model), atol=1e-5)
    assert "says no alpha; it is taken as the rank" in caplog.text
