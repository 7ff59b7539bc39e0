"""Every adapter format that is read, each written by the library it comes from, and what is written, read by stock."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.lora import Base, Lora, Stated, base_of, combined, read_base, read_lora, write_lora
from tdm_serve.models.lora.files import METADATA_KEY

ZIMAGE_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SD3_TARGETS = [f"attn.{one}" for one in (
    "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"
)]  # fmt: skip


def zimage() -> nn.Module:
    torch.manual_seed(1)
    return ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
        axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip


def sd3() -> nn.Module:
    torch.manual_seed(1)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=20, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def unet() -> nn.Module:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def output(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        if isinstance(model, ZImageTransformer2DModel):
            return model([random(4, 1, 8, 8)], torch.tensor([0.3]), [random(9, 20)], return_dict=False)[0][0]
        if isinstance(model, SD3Transformer2DModel):
            return model(random(1, 4, 8, 8), random(1, 5, 20), random(1, 12), torch.tensor([300.0])).sample
        return model(random(1, 4, 8, 8), 30, random(1, 5, 12)).sample


def config(targets: list[str], **more: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False, **more)


def fused(model: nn.Module, lora: Lora) -> nn.Module:
    with torch.no_grad():
        for name, delta in lora.modules.items():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(delta.added_to(weight))
    return model


def trained(make: Callable[[], nn.Module], settings: LoraConfig) -> Any:
    """A model of PEFT's with a random adapter in it."""
    torch.manual_seed(7)
    return get_peft_model(make(), settings)  # pyright: ignore[reportArgumentType]


MODELS = pytest.mark.parametrize(
    ("make", "targets", "pipeline"),
    [
        (zimage, [*ZIMAGE_TARGETS, "feed_forward.w1"], ZImagePipeline),
        (sd3, SD3_TARGETS, StableDiffusion3Pipeline),
        (unet, ["to_q", "to_k", "proj_in", "conv1"], StableDiffusionPipeline),
    ],
    ids=["zimage", "sd3", "unet"],
)
PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}}


@MODELS
@pytest.mark.parametrize("more", [{}, PATTERNS, {"use_rslora": True}], ids=["plain", "patterns", "rslora"])
@pytest.mark.parametrize("fold", [False, True], ids=["metadata", "folded"])
def test_peft_folders_reach_stock_diffusers(
    make: Callable[[], nn.Module], targets: list[str], pipeline: Any, more: dict[str, Any], fold: bool, tmp_path: Path
) -> None:
    """PEFT's folder -> ours -> the written file -> stock's loader: all four give the same output."""
    model = trained(make, config(targets, **more))
    model.save_pretrained(tmp_path / "peft")
    base = base_of(make(), "tiny")
    lora = read_lora(tmp_path / "peft", base)
    expected = output(model.base_model.model)
    assert torch.allclose(output(fused(make(), lora)), expected, atol=1e-5)
    assert not torch.allclose(expected, output(make()), atol=1e-3)
    path = write_lora(lora, tmp_path / "out.safetensors", base.component, fold_alpha=fold)
    stock = make()
    load_with_stock(pipeline, stock, path)
    assert torch.allclose(output(stock), expected, atol=1e-5)
    again = read_lora(path, base, "diffusers")
    assert torch.allclose(output(fused(make(), again)), expected, atol=1e-5)
    assert bool(again.warnings) == fold  # without alpha in the file it is the rank, as stock assumes


def load_with_stock(pipeline: Any, model: nn.Module, path: Path) -> None:
    if pipeline is StableDiffusionPipeline:
        state, alphas, metadata = pipeline.lora_state_dict(str(path), unet_config=None, return_lora_metadata=True)
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    else:
        state, metadata = pipeline.lora_state_dict(str(path), return_lora_metadata=True)
        pipeline.load_lora_into_transformer(state, model, metadata=metadata)


@MODELS
def test_diffusers_own_files(make: Callable[[], nn.Module], targets: list[str], pipeline: Any, tmp_path: Path) -> None:
    """As `save_lora_adapter` and `save_lora_weights` write them, alpha in the metadata."""
    model: Any = make()
    torch.manual_seed(7)
    model.add_adapter(config(targets))
    model.save_lora_adapter(tmp_path / "bare")
    base = base_of(make(), "tiny")
    state = get_peft_model_state_dict(model)
    layers, settings = f"{base.component}_lora_layers", f"{base.component}_lora_adapter_metadata"
    pipeline.save_lora_weights(tmp_path / "named", **{layers: state, settings: model.peft_config["default"].to_dict()})
    for folder in ("bare", "named"):
        lora = read_lora(tmp_path / folder, base)
        assert {delta.scale for delta in lora.modules.values()} == {2.5}
        assert torch.allclose(output(fused(make(), lora)), output(model), atol=1e-5)


@MODELS
def test_kohya_keys(make: Callable[[], nn.Module], targets: list[str], pipeline: Any, tmp_path: Path) -> None:
    """With alpha as a tensor of each module; against stock where stock reads kohya keys of the family."""
    model = trained(make, config(targets))
    base, path = base_of(make(), "tiny"), tmp_path / "kohya.safetensors"
    state = {f"unet.{key}": value for key, value in dotted(model).items()}
    tensors = {key: value.clone() for key, value in convert_state_dict_to_kohya(state).items()}
    downs = [key for key in tensors if key.endswith(".lora_down.weight")]
    tensors |= {key.replace(".lora_down.weight", ".alpha"): torch.tensor(10.0) for key in downs}
    save_file(tensors, path)
    lora = read_lora(path, base, "kohya")
    assert set(lora.modules) == set(base.targeted(targets))
    assert torch.allclose(output(fused(make(), lora)), output(model.base_model.model), atol=1e-5)
    if pipeline is StableDiffusionPipeline:
        stock = make()
        load_with_stock(pipeline, stock, path)
        assert torch.allclose(output(fused(make(), lora)), output(stock), atol=1e-5)
    with pytest.raises(ConfigError, match="only its base can name"):
        read_lora(path)
    with pytest.raises(ConfigError, match="stated to be peft, but holds kohya"):
        read_lora(path, base, "peft")


def dotted(model: Any) -> dict[str, Tensor]:
    return {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}


def published(make: Callable[[], nn.Module], targets: list[str], path: Path) -> Any:
    """A list as the published files' trainer collects and saves it; returns the model."""
    torch.manual_seed(7)
    settings = config(targets)
    model: Any = get_peft_model(make(), settings, adapter_name="tdm")  # pyright: ignore[reportArgumentType]
    listed = [p.clone().detach() for n, p in model.named_parameters() if "tdm" in n and p.requires_grad]
    torch.save({"decay": 0.9, "ema_parameters": listed}, path)
    return model


@pytest.mark.parametrize(
    ("make", "targets"),
    [(zimage, [*ZIMAGE_TARGETS, "add_k_proj", "add_v_proj"]), (sd3, SD3_TARGETS)],
    ids=["zimage", "sd3"],
)
def test_the_published_list(make: Callable[[], nn.Module], targets: list[str], tmp_path: Path) -> None:
    model = published(make, targets, tmp_path / "list.ckpt")
    base = base_of(make(), "tiny")
    lora = read_lora(tmp_path / "list.ckpt", base, "ema-list", Stated(4, 10.0))
    assert torch.allclose(output(fused(make(), lora)), output(model.base_model.model), atol=1e-5)
    assert set(lora.modules) == set(base.targeted(targets))


def full_size(folder: Path, model: type[Any], **settings: Any) -> Base:
    with torch.device("meta"):
        (folder / "transformer").mkdir(parents=True)
        model(**settings).save_config(folder / "transformer")
    return read_base(folder)


def test_published_files_have_the_counts_of_the_full_models(tmp_path: Path) -> None:
    base = full_size(tmp_path / "z", ZImageTransformer2DModel)
    with pytest.raises(CheckpointError, match=r"list of 3 tensors, but 272 are expected: A and B of the 136 modules"):
        read_lora(listed(tmp_path, [torch.ones(2, 2)] * 3), base, stated=Stated(alpha=64.0))
    base = full_size(
        tmp_path / "s", SD3Transformer2DModel, sample_size=128, num_layers=24, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="list of 3 tensors, but 382 are expected"):
        read_lora(listed(tmp_path, [torch.ones(2, 2)] * 3), base, stated=Stated(alpha=64.0))


def listed(folder: Path, tensors: list[Tensor]) -> Path:
    torch.save({"ema_parameters": tensors}, folder / "list.ckpt")
    return folder / "list.ckpt"


def test_lists_that_do_not_fit_say_what_was_found(tmp_path: Path) -> None:
    base = base_of(zimage(), "tiny")
    published(zimage, ZIMAGE_TARGETS, tmp_path / "list.ckpt")
    tensors: list[Tensor] = torch.load(tmp_path / "list.ckpt", weights_only=True)["ema_parameters"]
    stated = Stated(4, 10.0)
    with pytest.raises(ConfigError, match="says no alpha; state it"):
        read_lora(tmp_path / "list.ckpt", base)
    with pytest.raises(ConfigError, match="only its base can name"):
        read_lora(tmp_path / "list.ckpt")
    with pytest.raises(
        CheckpointError, match=r"shapes \(4, 48\) and \(48, 4\) at places 0 and 1, .* needs A \(8, 48\)"
    ):
        read_lora(tmp_path / "list.ckpt", base, stated=Stated(8, 10.0))
    with pytest.raises(CheckpointError, match=r"shapes \(48, 4\) and \(4, 48\) at places 0 and 1"):
        read_lora(listed(tmp_path, tensors[::-1]), base, stated=stated)
    with pytest.raises(CheckpointError, match=r"32 are expected: A and B of the 16 modules"):
        read_lora(listed(tmp_path, tensors[:-1]), base, stated=stated)
    zeros = [tensor if place % 2 == 0 else torch.zeros_like(tensor) for place, tensor in enumerate(tensors)]
    with pytest.raises(CheckpointError, match="changes nothing: all of its 16 B matrices are zero"):
        read_lora(listed(tmp_path, zeros), base, stated=stated)
    some = read_lora(listed(tmp_path, [*tensors[:-1], zeros[-1]]), base, stated=stated)
    assert some.warnings and "changes 1 of its 16 modules by nothing" in some.warnings[0]
    with pytest.raises(ConfigError, match="state which modules of UNet2DConditionModel"):
        read_lora(tmp_path / "list.ckpt", base_of(unet(), "tiny"), stated=stated)


class Harm:
    def __reduce__(self) -> Any:
        return print, ("harm done",)


def test_pickles_never_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema_parameters": [Harm()]}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="could run code, and it is refused"):
        read_lora(tmp_path / "a.ckpt")
    assert capsys.readouterr().out == ""


def test_a_pickled_state_dict_is_read(tmp_path: Path) -> None:
    model = trained(zimage, config(ZIMAGE_TARGETS))
    torch.save(dotted(model), tmp_path / "a.pt")
    lora = read_lora(tmp_path / "a.pt", base_of(zimage(), "tiny"), stated=Stated(alpha=10.0))
    assert torch.allclose(output(fused(zimage(), lora)), output(model.base_model.model), atol=1e-5)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_files_that_are_cut_short(name: str, tmp_path: Path) -> None:
    published(zimage, ZIMAGE_TARGETS, tmp_path / "a.ckpt")
    save_file({"transformer.x.lora_A.weight": torch.ones(4, 9)}, tmp_path / "a.safetensors")
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nothing"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot be read: .*cut short"):
            read_lora(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: .*missing"):
        read_lora(tmp_path / name)


def peft_file(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    trained(zimage, config(ZIMAGE_TARGETS)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    return path, load_file(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, r"no plain LoRA \(use_dora\); merge it into its base"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"init_lora_weights": "pissa"}, "pissa, which changes the base"),
        ({"r": 8}, "has rank 4 at .*, but rank 8 was stated"),
        ({"rank_pattern": {"(": 3}}, "unusable metadata"),
        ({"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "w1"]}, r"lacks .*w1 and 3 more modules"),
    ],
)
def test_configurations_that_are_not_read(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    peft_file(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=sentence):
        read_lora(tmp_path, base_of(zimage(), "tiny"))


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("layers.0.attention.to_q.dora_scale", "is a DoRA"),
        ("lora_unet_layers_0_attention_to_q.hada_w1_a", "is a LoHa"),
        ("layers.0.attention.to_q.lokr_w1", "is a LoKr"),
        ("layers.0.attention.to_q.lora_B.bias", "LoRA with biases"),
        ("layers.0.attention.to_q.weight", "no lora_A, lora_B, lora_down or lora_up weight"),
        ("layers.0.attention.to_q.lora_A.other.weight", "beside another for the same place"),
    ],
)
def test_other_kinds_of_adapter_are_refused(key: str, sentence: str, tmp_path: Path) -> None:
    path, tensors = peft_file(tmp_path)
    save_file(tensors | {key: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=sentence):
        read_lora(path)


def test_an_adapter_of_another_base_names_what_is_missing(tmp_path: Path) -> None:
    path, tensors = peft_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"names .*, which the base does not have: 16 of its 16 modules"):
        read_lora(path, base_of(sd3(), "tiny"))
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file(tensors | {key: torch.ones(4, 7)}, path)
    with pytest.raises(CheckpointError, match=r"by \(48, 7\), but the base has \(48, 48\)"):
        read_lora(path, base_of(zimage(), "tiny"))
    save_file({name: value for name, value in tensors.items() if name != key}, path)
    with pytest.raises(CheckpointError, match="lacks lora_A of "):
        read_lora(path)
    save_file(tensors | {key: tensors[key] * float("nan")}, path)
    with pytest.raises(CheckpointError, match="no finite floating-point"):
        read_lora(path)


def test_what_is_stated_must_agree_with_the_file(tmp_path: Path) -> None:
    peft_file(tmp_path)
    assert read_lora(tmp_path, stated=Stated(4, 10.0)).modules
    with pytest.raises(ConfigError, match=r"rank 8 was stated, but adapter .* says 4"):
        read_lora(tmp_path, stated=Stated(rank=8))
    with pytest.raises(ConfigError, match="alpha 8 was stated"):
        read_lora(tmp_path, stated=Stated(alpha=8.0))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(ConfigError, match="must be"):
            Stated(**wrong)
    with pytest.raises(ConfigError, match=r"format 'x' is unknown; choose auto, diffusers"):
        read_lora(tmp_path, format="x")


def test_text_encoder_parts_are_told_of(tmp_path: Path) -> None:
    path, tensors = peft_file(tmp_path)
    save_file(tensors | {"text_encoder.x.lora_A.weight": torch.ones(4, 4)}, path)
    assert "1 tensors of adapter" in read_lora(path).warnings[0]


def test_several_at_once_equal_one_after_the_other(tmp_path: Path) -> None:
    loras: list[Lora] = []
    for name, targets in (("a", ZIMAGE_TARGETS), ("b", ["to_q", "feed_forward.w2"])):
        trained(zimage, config(targets)).save_pretrained(tmp_path / name)
        loras.append(read_lora(tmp_path / name))
    both = combined([(loras[0], 0.5), (loras[1], -2.0)])
    one = fused(zimage(), combined([(loras[0], 0.5)]))
    expected = output(fused(one, combined([(loras[1], -2.0)])))
    assert torch.allclose(output(fused(zimage(), both)), expected, atol=1e-4)
    assert both.modules["layers.0.attention.to_q"].rank == 8


def test_metadata_is_what_peft_understands(tmp_path: Path) -> None:
    trained(zimage, config(ZIMAGE_TARGETS, **PATTERNS)).save_pretrained(tmp_path / "a")
    path = write_lora(read_lora(tmp_path / "a"), tmp_path / "b.safetensors", dtype=torch.bfloat16)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()[METADATA_KEY])
        assert file.get_tensor("transformer.layers.0.attention.to_k.lora_A.weight").dtype == torch.bfloat16
    assert settings["transformer.r"] == 4 and settings["transformer.lora_alpha"] == 10
    assert set(settings["transformer.alpha_pattern"].values()) == {3}


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no diffusers folder"):
        read_base(tmp_path)
    for content, sentence in (("{", "no diffusers configuration"), ('{"_class_name": "X"}', "class 'X'; adapters are")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=sentence):
            read_base(tmp_path)


def test_other_spellings_are_the_same_adapter(tmp_path: Path) -> None:
    """Those of older diffusers, of node-based programs, and a PEFT key with the adapter's name in it."""
    base, state = base_of(unet(), "tiny"), dotted(trained(unet, config(["to_q", "to_out.0"])))
    alphas = {f"{name}.alpha": torch.tensor(10.0) for name in base.targeted(["to_q", "to_out.0"])}

    def old(key: str) -> str:
        key = key.replace(".to_out.0.lora", ".to_out.lora").replace("_A.weight", "_down").replace("_B.weight", "_up")
        return "unet." + re.sub(r"\.(to_q|to_out)\.lora_(down|up)$", r".processor.\1_lora.\2.weight", key)

    spellings: list[Callable[[str], str]] = [
        old,
        lambda key: "unet." + key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: "diffusion_model." + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        lambda key: "base_model.model.unet." + key.replace(".weight", ".default.weight"),
    ]
    for spell in spellings:
        save_file({spell(key): value for key, value in state.items()}, tmp_path / "a.safetensors")
        lora = read_lora(tmp_path / "a.safetensors", base)
        assert set(lora.modules) == set(base.targeted(["to_q", "to_out.0"]))
        assert {delta.scale for delta in lora.modules.values()} == {1.0}
        for name, delta in lora.modules.items():
            assert torch.equal(delta.a, state[f"{name}.lora_A.weight"])
    save_file(state | alphas, tmp_path / "a.safetensors")
    assert {delta.scale for delta in read_lora(tmp_path / "a.safetensors", base).modules.values()} == {2.5}


def test_untrained_adapters_are_refused_where_they_are_used(tmp_path: Path) -> None:
    path, tensors = peft_file(tmp_path)
    save_file({key: value * ("lora_A" in key) for key, value in tensors.items()}, path)
    assert len(read_lora(path).modules) == 16  # a trainer may start from one
    with pytest.raises(CheckpointError, match="changes nothing"):
        read_lora(path, base_of(zimage(), "tiny"))
