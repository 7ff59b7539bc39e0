"""A random Z-Image transformer of a few thousand weights as a trainee, without autoencoder or text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from toy_trainee import ToyTrainee

from tdm_finetune.process import Flow
from tdm_finetune.scoring import World
from tdm_finetune.trainee import Conditioning, Prompt
from tdm_finetune.zimage import VelocityNet, linears, repeated
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.lora import Lora

TEXT_WIDTH = 20


def transformer() -> ZImageTransformer2DModel:
    """The same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = ZImageTransformer2DModel(
            in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT_WIDTH,
            axes_dims=[8, 8, 8], axes_lens=[64, 32, 32],
        )  # fmt: skip
    return made.requires_grad_(False)


class TinyZImage:
    adapter: Lora | None = None
    component = "transformer"
    checkpoint_hash = "tiny"
    picture_size = (8, 8)
    world: World | None = None

    def __init__(self) -> None:
        self.transformer = transformer()
        denoiser = ZImageDenoiser(self.transformer)
        self.net: nn.Module = VelocityNet(denoiser)
        self.process = Flow(3.0)
        self.latent_shape = (4, 8, 8)
        self._linears, self._blocks = linears(self.transformer), repeated(denoiser)

    def linears(self) -> dict[str, nn.Linear]:
        return self._linears

    def blocks(self) -> Sequence[nn.Module]:
        return self._blocks

    def check_prompt(self, prompt: str) -> None:
        """Every text is read."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """32 tokens a prompt, as random as their text."""
        seeds = [torch.Generator().manual_seed(crc32(prompt.encode())) for prompt in prompts]
        text = torch.stack([torch.randn(32, TEXT_WIDTH, generator=seed) for seed in seeds])
        return text, torch.tensor([len(prompt.split()) for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return ToyTrainee().decode(latents[:, :2])

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        return ToyTrainee().prompts(split, seed)

    def save(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder)
