"""A tiny checkpoint of every family: the folders of `tests.tdm_serve.tiny_folders` with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tdm_finetune.text import TextConfig, build_tokenizer
from tdm_serve.models.spec import FORMAT, MANIFEST
from tdm_serve.sampling import sigma_grid
from tests.tdm_serve import tiny_folders

LIMITS = {"width": 64, "height": 64, "size_multiple": 16, "min_side": 32, "max_side": 192, "max_prompt_tokens": 32}
FLOW = {"sampler": "euler", "shift": 3.0, "sigmas": sigma_grid(6, 3.0)}
TIMES = [899.0, 749.0, 599.0, 449.0, 299.0, 149.0]
DDIM = {"sampler": "ddim", "shift": 1.0, "times": TIMES, "sigmas": []}


@dataclass(frozen=True)
class Kind:
    """How a folder is made, and what its manifest says."""

    make: Callable[[Path], Path]
    family: str
    version: dict[str, Any]
    process: dict[str, Any]
    trained: int  # modules that get a LoRA
    guidance: float = 2.0  # of the teacher


def zimage(folder: Path) -> Path:
    """Z-Image's kind, with a tokenizer that knows nothing of the synthetic world."""
    tokenizer = build_tokenizer(TextConfig(vocabulary=300, max_tokens=64))
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip
    encoder = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    ZImagePipeline(
        transformer=tiny_folders.randomised(transformer, 0, 0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_folders.autoencoder(16, 0.3611, 0.1159, quant=False),
        text_encoder=tiny_folders.randomised(Qwen3Model(encoder), 1),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


BETAS = {"start": 0.00085, "end": 0.012, "schedule": "scaled_linear"}
KINDS = {
    "zimage": Kind(zimage, "zimage", FLOW, {}, 28),
    "sd35": Kind(tiny_folders.sd3, "sd3", FLOW, {}, 3 * 8 - 1),
    "sd3-without-t5": Kind(lambda at: tiny_folders.sd3(at, t5=False, dual=False), "sd3", FLOW, {}, 3 * 8 - 1),
    "sd15": Kind(tiny_folders.sd15, "sd15", DDIM, {"prediction": "epsilon", "betas": BETAS}, 4 * 10, 20.0),
    "pixart": Kind(
        tiny_folders.pixart, "pixart", DDIM, {"prediction": "epsilon", "betas": {"start": 1e-4, "end": 0.02}}, 2 * 10
    ),
}


def checkpoint(kind: str, folder: Path) -> Path:
    """The folder of a kind as a checkpoint whose only version is a guided multi-step teacher."""
    with torch.random.fork_rng(devices=[]):
        KINDS[kind].make(folder)
    version = KINDS[kind].version | {"description": "tiny", "adapter": None, "guidance": KINDS[kind].guidance}
    manifest = {"format": FORMAT, "family": KINDS[kind].family, "limits": LIMITS, **KINDS[kind].process}
    described = manifest | {"versions": {"teacher": version}, "default": "teacher"}
    (folder / MANIFEST).write_text(json.dumps(described))
    return folder
