"""ImageReward: BLIP with a small head, trained on people's rankings of pictures of one prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdm_finetune.rewards.aesthetic import predictor
from tdm_finetune.rewards.base import Metadata, Reward
from tdm_finetune.rewards.hub import device_of, fill, pixels, tokenizer_of, weights

MODEL = "THUDM/ImageReward"
FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the training data
MAX_TOKENS = 35

# BLIP's names in the published file -> transformers'; in this order, at the start of a name or inside it
RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def imagereward(model: str = MODEL, tokenizer: str = "google-bert/bert-base-uncased", device: str = "auto") -> Reward:
    """The raw score, about -2 to 2.

    ImageReward-v1.0 (Xu et al. 2023): BLIP-L reads the prompt with the picture as cross-attention, five linear layers
    on the first token, minus the mean and over the deviation of the training data. `model` is the published
    ImageReward.pt or a hub id that has it.
    """
    from transformers import BertTokenizer

    chosen = device_of(device)
    scorer = from_published(weights("imagereward", model, FILE), *blip_large(), where=model).to(chosen).eval()
    return scored(scorer, tokenizer_of("imagereward", BertTokenizer, tokenizer), chosen)


def scored(scorer: ImageReward, tokenizer: Any, device: torch.device) -> Reward:
    """The reward over any such model."""

    def reward(images: Tensor, prompts: Sequence[str], _metadata: Sequence[Metadata]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        seen = pixels(images, int(scorer.vision.config.image_size), device)
        return scorer(seen, tokens["input_ids"].to(device), tokens["attention_mask"].to(device))

    return reward


class ImageReward(nn.Module):
    """Pixels (B, 3, side, side) and tokens (B, L) with their mask -> scores (B,)."""

    def __init__(self, vision: Any, text: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.head = predictor(text.hidden_size)

    def forward(self, pixel_values: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixel_values).last_hidden_state  # (B, patches + 1, D)
        read = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - MEAN) / STD


def blip_large() -> tuple[Any, Any]:
    """Vision and text configuration of the published model."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=30524,
        is_decoder=True,  # transformers' name for having cross-attention; the model still reads both ways
    )
    return vision, text


def from_published(state: dict[str, Tensor], vision: Any, text: Any, where: str) -> ImageReward:
    """The model with the weights of a published file; ConfigError where they do not fit."""
    return fill("imagereward", ImageReward(vision, text), renamed(state), where)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published names in transformers' terms; what scoring does not use is left out."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(UNUSED):
            continue
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)  # noqa: PLW2901 - one renaming after another is the point
        result[name] = value
    return result
