"""LAION's aesthetic score: how much people like a picture, whatever its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tdm_finetune.rewards.base import Metadata, Reward
from tdm_finetune.rewards.clip import CLIP_L, Clip
from tdm_finetune.rewards.hub import device_of, fill, pixels, pretrained, weights

HEAD = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
PREFIX = "layers."


def aesthetic(model: str = CLIP_L, head: str = HEAD, device: str = "auto") -> Reward:
    """The improved aesthetic predictor's raw score, about 4 to 7.

    Five linear layers without activations on the normalised CLIP-L/14 embedding (Schuhmann 2022, the
    sac+logos+ava1-l14-linearMSE weights), unscaled as in the released trainers. `head` is LAION's `.pth`, a
    `.safetensors` with the same names, or a hub id with a model.safetensors that has them.
    """
    from transformers import CLIPModel

    chosen = device_of(device)
    tower = Clip(pretrained("aesthetic", CLIPModel, model), None, chosen)
    found = weights("aesthetic", head, "model.safetensors")
    state = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
    layers = fill("aesthetic", predictor(tower.model.config.projection_dim), state, head).to(chosen).eval()

    def reward(images: Tensor, _prompts: Sequence[str], _metadata: Sequence[Metadata]) -> Tensor:
        return layers(tower.image_features(pixels(images, tower.side, chosen))).squeeze(-1)

    return reward


def predictor(width: int) -> nn.Sequential:
    """(B, width) -> (B, 1), with the layer numbers of the published file, in which dropout takes part."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
