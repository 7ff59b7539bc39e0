"""Human Preference Score v2: CLIP-H fine-tuned on people's choices between pictures of one prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_finetune.rewards.base import Metadata, Reward
from tdm_finetune.rewards.clip import CLIP_H, Clip
from tdm_finetune.rewards.hub import CLIP_MEAN, CLIP_STD, device_of, fill, pretrained, tokenizer_of, weights

MODEL = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"

# open_clip's names of a block's parts -> transformers'
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VISION = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' spelling
    "visual.ln_post.": "vision_model.post_layernorm.",
}
TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def hpsv2(model: str = MODEL, tokenizer: str = CLIP_H, device: str = "auto") -> Reward:
    """cos(picture, prompt), about 0.2 to 0.35.

    HPS v2.1 (Wu et al. 2023): the cosine itself, without CLIP's scale, of pictures fitted into the square with black
    borders. `model` is the published open_clip file, a hub id that has HPS_v2.1_compressed.pt, or a folder in
    transformers' CLIPModel form.
    """
    from transformers import CLIPModel, CLIPTokenizer

    chosen = device_of(device)
    if (Path(model) / "config.json").is_file():
        loaded = pretrained("hpsv2", CLIPModel, model)
    else:
        loaded = from_open_clip(weights("hpsv2", model, FILE), vit_h_14(), model)
    return cosine(Clip(loaded, tokenizer_of("hpsv2", CLIPTokenizer, tokenizer), chosen))


def cosine(model: Clip) -> Reward:
    """The reward over any CLIP model."""

    def reward(images: Tensor, prompts: Sequence[str], _metadata: Sequence[Metadata]) -> Tensor:
        shown = model.image_features(fitted(images, model.side, model.device))
        return (shown * model.text_features(prompts)).sum(-1)

    return reward


def fitted(images: Tensor, side: int, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, side, side): long side resized (bicubic), black borders, CLIP's normalisation."""
    values = images.to(device).permute(0, 3, 1, 2).float() / 255
    height, width = (round(length * side / max(values.shape[2:])) for length in values.shape[2:])
    if (height, width) != tuple(values.shape[2:]):
        values = F.interpolate(values, (height, width), mode="bicubic", antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    values = F.pad(values, (left, side - width - left, top, side - height - top))
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (values - mean) / std


def vit_h_14() -> Any:
    """open_clip's ViT-H-14 as transformers describes it."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(
        vision_config={**vision, "intermediate_size": 5120, "image_size": 224, "hidden_act": "gelu"},
        text_config={**text, "intermediate_size": 4096, "hidden_act": "gelu"},
        projection_dim=1024,
    )


def from_open_clip(state: dict[str, Tensor], config: Any, where: str) -> Any:
    """A CLIPModel of `config` with the weights of an open_clip state dict; ConfigError where they do not fit."""
    from transformers import CLIPModel

    return fill("hpsv2", CLIPModel(config), renamed(state), where)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict in transformers' names: attention's joined matrix cut in three, projections turned."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in PROJECTIONS:
            result[PROJECTIONS[name]] = value.T.contiguous()
        elif block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            tower = "vision_model" if block[1] else "text_model"
            result |= _block(f"{tower}.encoder.layers.{block[2]}.", block[3], value)
        elif name != "attn_mask":  # the causal mask, which old files carry along
            result[_moved(name)] = value
    return result


def _block(prefix: str, rest: str, value: Tensor) -> dict[str, Tensor]:
    joined = re.fullmatch(r"attn\.in_proj_(weight|bias)", rest)
    if joined:
        names = [f"{prefix}self_attn.{part}_proj.{joined[1]}" for part in "qkv"]
        return dict(zip(names, value.chunk(3), strict=True))
    part, _, kind = rest.rpartition(".")
    return {f"{prefix}{BLOCK.get(part, part)}.{kind}": value}


def _moved(name: str) -> str:
    for old, new in (*VISION.items(), *TEXT.items()):
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name
