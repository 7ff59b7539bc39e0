"""Fusing LoRA files, against PEFT through diffusers, with alpha different from the rank."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from tdm_finetune.roles import ADAPTER_FILE, Role, Roles
from tdm_finetune.trainee import Conditioning, Trainee
from tdm_finetune.zimage import VelocityNet, linears
from tdm_serve import Pipeline
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError
from tdm_serve.models.adapters import fuse_adapters
from tdm_serve.models.catalog import EMBEDDED
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.load import examine, load
from tdm_serve.models.lora import combined, read_lora, write_lora
from tdm_serve.models.spec import MANIFEST, Adapter


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
    net, component = VelocityNet(ZImageDenoiser(model)), "transformer"
    trainee = SimpleNamespace(net=net, linears=lambda: linears(model), component=component)
    return Roles(cast(Trainee, trainee), 4, 10.0).new(torch.Generator(), adapter and read_lora(adapter))


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded one with a version of two halves of its adapter, one by its scale and one by its file."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("checkpoint") / "scenes"))
    manifest = json.loads((folder / MANIFEST).read_text())
    name = "adapters/tdm.safetensors"
    halves = [{"path": name, "scale": 0.5}, {"path": "half.safetensors"}]
    write_lora(combined([(read_lora(folder / name), 0.5)]), folder / "half.safetensors", fold_alpha=True)
    manifest["versions"]["halves"] = manifest["versions"]["tdm"] | {"adapter": halves}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("adapters", ["alone", "fused", "separate"])
def test_a_version_of_two_adapters_is_served(checkpoint: Path, adapters: str) -> None:
    names = [f"{checkpoint}@halves", f"{checkpoint}@tdm"]
    if adapters == "alone":
        halves, whole = (Pipeline.from_pretrained(name)("two red circles", seed=3)[0].image for name in names)
    else:
        pipeline = Pipeline(Engine.load(names, adapters=adapters))
        halves, whole = (pipeline("two red circles", seed=3, model=name)[0].image for name in names)
    assert np.abs(np.asarray(halves).astype(int) - np.asarray(whole).astype(int)).max() <= 8
    assert np.asarray(whole).std() > 1


def test_scales_are_part_of_the_digest(checkpoint: Path) -> None:
    hashes = {load(f"{checkpoint}@{version}").served[0].checkpoint_hash for version in ("halves", "tdm", "teacher")}
    assert len(hashes) == 3
    spec, files = examine(f"{checkpoint}@tdm")
    assert checkpoint_hash(replace(spec, adapters=(replace(spec.adapters[0], scale=0.5),)), files) not in hashes


def test_a_manifest_with_an_odd_adapter_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    manifest = json.loads((folder / MANIFEST).read_text())
    for odd, sentence in (
        ({"path": "a", "strength": 1}, "it takes path, a finite scale"),
        ({"scale": 1}, "not usable"),
        ({"path": "a", "scale": "much"}, "not usable"),
        ("nowhere.safetensors", "nowhere.safetensors, which is missing"),
    ):
        manifest["versions"]["tdm"]["adapter"] = odd
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=sentence):
            examine(f"{folder}@tdm")
