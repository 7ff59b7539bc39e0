"""Rewards from CLIP and its fine-tuned siblings: how well a picture fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdm_finetune.rewards.base import Metadata, Reward
from tdm_finetune.rewards.hub import device_of, pixels, pretrained, tokenizer_of

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MAX_TOKENS = 77  # longer prompts are cut, as everywhere in CLIP


class Clip:
    """A CLIP model with its tokenizer; `cosines` is what every reward here is made of."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = device
        self.side = int(model.config.vision_config.image_size)

    @property
    def scale(self) -> float:
        """exp(logit_scale), the inverse temperature of CLIP's training; 100 for the published models."""
        return float(self.model.logit_scale.exp())

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, D) of length 1."""
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D) of length 1."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        pooled = self.model.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each picture with its own prompt; (B,)."""
        shown = self.image_features(pixels(images, self.side, self.device))
        return (shown * self.text_features(prompts)).sum(-1)


def load(reward: str, model: str, tokenizer: str, device: str) -> Clip:
    """A CLIPModel and its tokenizer from folders or hub ids; ConfigError where they cannot be had."""
    from transformers import CLIPModel, CLIPTokenizer

    chosen = device_of(device)
    loaded = pretrained(reward, CLIPModel, model)
    return Clip(loaded, tokenizer_of(reward, CLIPTokenizer, tokenizer), chosen)


def clip(model: str = CLIP_L, tokenizer: str | None = None, device: str = "auto") -> Reward:
    """exp(logit_scale) cos(picture, prompt) / 30, about 0.5 to 1.2.

    CLIP's logit (Radford et al. 2021) over 30, as the released DGPO trainer scales it. `model` and `tokenizer` are
    folders or hub ids; the tokenizer is the model's own unless it is named.
    """
    return _scaled(load("clip", model, tokenizer or model, device), 30.0)


def pickscore(model: str = "yuvalkirstain/PickScore_v1", tokenizer: str = CLIP_H, device: str = "auto") -> Reward:
    """exp(logit_scale) cos(picture, prompt) / 26, about 0.7 to 0.95; reported figures are 26 times that.

    PickScore (Kirstain et al. 2023) as the Flow-GRPO and DGPO trainers scale it for training.
    """
    return _scaled(load("pickscore", model, tokenizer, device), 26.0)


def _scaled(model: Clip, divisor: float) -> Reward:
    def reward(images: Tensor, prompts: Sequence[str], _metadata: Sequence[Metadata]) -> Tensor:
        return model.cosines(images, prompts) * (model.scale / divisor)

    return reward
