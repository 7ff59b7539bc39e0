"""A tiny Z-Image checkpoint with random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tdm_exporters.options import Options
from tdm_serve.models.catalog import EMBEDDED
from tdm_serve.models.spec import MANIFEST


def randomised(module: Any, seed: int) -> Any:
    """Every weight drawn anew, so that none is zero and nothing cancels; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        spread = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.data = 1 + spread if "norm" in name and name.endswith("weight") else spread
    return module.eval()


def checkpoint(folder: Path, seed: int = 0) -> Path:
    """The default's tokenizer and limits over networks of one layer or two."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("training", "adapters", "*.safetensors"))
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    randomised(transformer, seed).save_pretrained(folder / "transformer")
    text: Any = Qwen3Config(
        vocab_size=536, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    randomised(Qwen3Model(text), seed + 1).save_pretrained(folder / "text_encoder")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1,
        scaling_factor=0.7, shift_factor=-0.2, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip
    randomised(vae, seed + 2).save_pretrained(folder / "vae")
    manifest = json.loads((folder / MANIFEST).read_text())
    version = manifest["versions"][manifest["default"]] | {"adapter": None}
    version.pop("lineage", None)
    guided = version | {"guidance": 3.0}
    manifest |= {"default": "plain", "versions": {"plain": version, "guided": guided}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@dataclass(frozen=True)
class Made:
    """An engine's folder, the unpublished folder just before it was compared, and what the exporter said."""

    engine: Path
    partial: Path
    said: tuple[str, ...]


def options(tiny: Path, folder: Path) -> Options:
    return Options(str(tiny), "onnx", folder, sizes=((128, 128), (64, 96)), batch=(1, 3))
