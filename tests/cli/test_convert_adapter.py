"""`tdm-serve convert ADAPTER --base ...`: from the published list to a file that stock diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model

from tdm_serve.cli.main import main
from tdm_serve.models.catalog import EMBEDDED
from tdm_serve.models.lora import read_lora


def transformer() -> Any:
    torch.manual_seed(1)
    return ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
        axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
    ).eval()  # fmt: skip


def output(model: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    latents, text = torch.randn(4, 1, 8, 8, generator=random), torch.randn(9, 20, generator=random)
    with torch.no_grad():
        return model([latents], torch.tensor([0.3]), [text], return_dict=False)[0][0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    transformer().save_config(tmp_path / "base" / "transformer")
    return tmp_path / "base"


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any]:
    """A list as TDM-R1's trainer saves it, rank 4 and alpha 8, and its model."""
    torch.manual_seed(7)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model: Any = get_peft_model(transformer(), settings, adapter_name="tdmr1")
    listed = [p.detach().clone() for n, p in model.named_parameters() if "tdmr1" in n and p.requires_grad]
    torch.save({"decay": 0.9, "ema_parameters": listed}, tmp_path / "list.ckpt")
    return tmp_path / "list.ckpt", model.base_model.model


@pytest.mark.parametrize("fold", [(), ("--fold-alpha",)], ids=["metadata", "folded"])
def test_the_published_list_reaches_stock_diffusers(
    base: Path, published: tuple[Path, Any], fold: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = published
    out = tmp_path / "named.safetensors"
    assert main(["convert", str(path), "--base", str(base), "--rank", "4", "--alpha", "8", "-o", str(out), *fold]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    stock = transformer()
    state, metadata = ZImagePipeline.lora_state_dict(str(out), return_lora_metadata=True)
    ZImagePipeline.load_lora_into_transformer(state, stock, metadata=metadata)
    assert torch.allclose(output(stock), output(model), atol=1e-5)
    assert not torch.allclose(output(stock), output(transformer()), atol=1e-3)


def test_an_id_is_a_base_and_scale_is_kept(tmp_path: Path) -> None:
    adapter, out = EMBEDDED / "adapters" / "tdm.safetensors", tmp_path / "half.safetensors"
    assert main(["convert", str(adapter), "--base", "default", "--scale", "0.5", "-o", str(out)]) == 0
    before, after = read_lora(adapter).modules, read_lora(out).modules
    assert {name: delta.scale / 2 for name, delta in before.items()} == {n: d.scale for n, d in after.items()}


def test_what_is_missing_is_said(
    base: Path, published: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(published[0]), str(tmp_path / "out.safetensors")
    stated = ["--base", str(base), "--alpha", "8"]
    for arguments, sentence in (
        ([path, "-o", out], "name the base that it is for with --base"),
        ([path, "--alpha", "8", "-o", out], "without --base"),
        ([path, "--base", str(base), "-o", out], "says no alpha"),
        ([path, *stated, "-o", str(tmp_path / "folder")], "must be a file that ends in .safetensors"),
        ([path, *stated, "-o", out, "--scale", "0"], "scale is 0"),
        ([path, *stated, "-o", out, "--rank", "32"], "its rank, order or base is another"),
        ([path, *stated, "-o", out, "--targets", "to_q"], "are expected: A and B of the 4 modules"),
        ([path, *stated, "-o", out, "--adapter-format", "kohya"], "state ema-list or auto"),
        ([path, "--base", "nowhere", "--alpha", "8", "-o", out], "neither a known id nor a folder"),
    ):
        assert main(["convert", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert not Path(out).exists()
    Path(out).write_text("kept")
    assert main(["convert", path, *stated, "-o", out]) == 2
    assert "exists; name a new file" in capsys.readouterr().err
    assert Path(out).read_text() == "kept"
