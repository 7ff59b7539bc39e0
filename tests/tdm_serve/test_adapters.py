"""Fusing LoRA files, against PEFT through diffusers, with alpha different from the rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tdm_finetune.roles import ADAPTER_FILE, Role, Roles
from tdm_finetune.trainee import Conditioning, Trainee
from tdm_finetune.zimage import VelocityNet, linears
from tdm_serve.errors import CheckpointError
from tdm_serve.models.adapters import METADATA_KEY, fuse_lora, read_lora
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser


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
    assert fuse_lora(ours, adapter) == len(linears(ours)) == 28
    assert torch.allclose(output(ours), output(stock), atol=1e-5)
    assert not torch.allclose(output(ours), output(transformer()), atol=1e-2)


def test_fusing_equals_the_trainers_role(adapter: Path) -> None:
    random = torch.Generator().manual_seed(2)
    text = torch.randn(2, 32, 20, generator=random), torch.tensor([9, 32])
    latents, sigma = torch.randn(2, 4, 8, 8, generator=random), torch.tensor([0.3, 0.9])
    conditioning: Conditioning = text
    fused = transformer()
    fuse_lora(fused, adapter)
    with torch.no_grad():
        served = VelocityNet(ZImageDenoiser(fused))(latents, sigma, *conditioning)
        trained = new_role(adapter)(latents, sigma, conditioning)
        assert not torch.allclose(new_role()(latents, sigma, conditioning), served, atol=1e-2)
    assert torch.allclose(trained, served, atol=1e-5)
    assert read_lora(adapter)[1] == 2.5


def test_a_peft_file_without_metadata_has_scale_one(tmp_path: Path) -> None:
    model = transformer()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False), "x")
    state = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(model, adapter_name="x").items()}
    save_file(state, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors")[1] == 1.0
    ours = transformer()
    fuse_lora(ours, tmp_path / "a.safetensors")
    assert torch.allclose(output(ours), output(model), atol=1e-5)


def test_a_file_that_does_not_fit_names_what(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter)
    name = "transformer.layers.0.attention.to_q"
    broken = tmp_path / "broken.safetensors"
    save_file(tensors | {f"{name}.lora_A.weight": torch.zeros(4, 7)}, broken)
    with pytest.raises(CheckpointError, match=r"layers.0.attention.to_q by \(48, 7\)"):
        fuse_lora(transformer(), broken)
    save_file({k: v for k, v in tensors.items() if k != f"{name}.lora_B.weight"}, broken)
    with pytest.raises(CheckpointError, match="lacks"):
        read_lora(broken)
    save_file(
        {
            "transformer.nowhere.lora_A.weight": torch.zeros(4, 7),
            "transformer.nowhere.lora_B.weight": torch.zeros(7, 4),
        },
        broken,
    )
    with pytest.raises(CheckpointError, match="nowhere"):
        fuse_lora(transformer(), broken)
    save_file({f"transformer.layers.0.attention.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}, broken)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention, which"):
        fuse_lora(transformer(), broken)
    save_file({"alpha": torch.zeros(1)}, broken)
    with pytest.raises(CheckpointError, match="'alpha'"):
        read_lora(broken)
    save_file({}, broken)
    with pytest.raises(CheckpointError, match="no LoRA"):
        read_lora(broken)
    broken.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_lora(broken)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ('{"transformer.rank_pattern": {"to_q": 8}}', "differently .rank_pattern"),
        ('{"transformer.alpha_pattern": {"to_q": 8}}', "differently .alpha_pattern"),
        ('{"transformer.use_rslora": true}', "differently .use_rslora"),
        ('{"transformer.lora_alpha": "much"}', "unusable metadata"),
        ("[]", "unusable metadata"),
        ("{", "unusable metadata"),
    ],
)
def test_scales_that_are_not_read_are_refused(adapter: Path, tmp_path: Path, settings: str, sentence: str) -> None:
    """Fusing them with one scale would give wrong pictures in silence."""
    save_file(load_file(adapter), tmp_path / "a.safetensors", metadata={METADATA_KEY: settings})
    with pytest.raises(CheckpointError, match=sentence):
        read_lora(tmp_path / "a.safetensors")


def test_several_ranks_are_refused(adapter: Path, tmp_path: Path) -> None:
    name = "transformer.layers.0.attention.to_q"
    wider = {f"{name}.lora_A.weight": torch.zeros(6, 48), f"{name}.lora_B.weight": torch.zeros(48, 6)}
    save_file(load_file(adapter) | wider, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="several ranks"):
        read_lora(tmp_path / "a.safetensors")
