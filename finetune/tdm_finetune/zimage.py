"""The Z-Image family as trainers see it: the dense denoiser, its text encoder and autoencoder, the scene world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from tdm_finetune import scenes
from tdm_finetune.cache import Frozen
from tdm_finetune.process import Flow
from tdm_finetune.scoring import SCENES, World
from tdm_finetune.trainee import Conditioning, Prompt
from tdm_serve.errors import ConfigError
from tdm_serve.models.families.zimage import load_transformer
from tdm_serve.models.families.zimage_denoiser import Block, ZImageDenoiser
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.load import examine
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import Adapter, ModelSpec

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


class VelocityNet(nn.Module):
    """Text refinement, modulation and denoising as one module, so that adapters reach all of them."""

    def __init__(self, denoiser: ZImageDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and levels (B,), for text (B, L, D) of `lengths` (B,)."""
        denoiser = self.denoiser
        return denoiser(latents, denoiser.modulation(sigma), denoiser.refine_text(text, lengths))


def linears(transformer: ZImageTransformer2DModel) -> dict[str, nn.Linear]:
    """Every projection of attention and feed-forward by its diffusers name, in a fixed order."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(TARGETS)
    }


def repeated(denoiser: ZImageDenoiser) -> list[nn.Module]:
    """Its blocks, behind the parts of them that `ZImageDenoiser.modulation` calls from outside of the blocks."""
    blocks = [cast(Block, block) for block in (*denoiser.image_blocks, *denoiser.text_blocks, *denoiser.blocks)]
    return [*(block.modulation for block in blocks if block.modulation is not None), *blocks]


def _start(spec: ModelSpec) -> Path | None:
    """The adapter that training goes on from: one, as strong as its file says."""
    if not spec.adapters:
        return None
    if spec.adapters != (Adapter(spec.adapters[0].path),):
        raise ConfigError(
            f"{spec.id} has {len(spec.adapters)} adapters or one with settings beside its file; training goes on from "
            "a single plain one, which `tdm-serve convert` writes"
        )
    return spec.adapters[0].path


class ZImageTrainee:
    """A Z-Image transformer with its frozen parts as a `Trainee`; `adapter` belongs to it and is not yet applied."""

    world: World | None = SCENES

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        frozen: Frozen,
        *,
        shift: float,
        picture_size: tuple[int, int],
        text_tokens: int,
        adapter: Path | None = None,
        checkpoint_hash: str = "",
    ) -> None:
        self.transformer, self.frozen, self.text_tokens = transformer, frozen, text_tokens
        self.adapter, self.checkpoint_hash, self.picture_size = adapter, checkpoint_hash, picture_size
        self.denoiser = ZImageDenoiser(transformer)
        self.net: nn.Module = VelocityNet(self.denoiser)
        self.process = Flow(shift)
        width, height = (side // frozen.factor for side in picture_size)
        self.latent_shape = (frozen.channels, height, width)
        self._linears = linears(transformer)

    @classmethod
    def load(cls, checkpoint: str | Path, *, text_tokens: int) -> ZImageTrainee:
        """From an id or a folder; raises as the SDK's loader does."""
        spec, files = examine(checkpoint)
        with quiet_bars():
            transformer = load_transformer(replace(spec, adapters=()))
        return cls(
            transformer,
            Frozen.load(spec.base / "vae", spec.base),
            shift=spec.shift,
            picture_size=(spec.width, spec.height),
            text_tokens=text_tokens,
            adapter=_start(spec),
            checkpoint_hash=checkpoint_hash(spec, files),
        )

    def blocks(self) -> Sequence[nn.Module]:
        return repeated(self.denoiser)

    def base(self, latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The network with its own weights, as a `paint.Network`."""
        return self.net(latents, level, *conditioning)

    def linears(self) -> dict[str, nn.Linear]:
        return self._linears

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.frozen.encode(list(prompts), self.text_tokens)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.frozen.to_pictures(latents.float())

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        for prompt in scenes.prompts(cast(scenes.Split, split), seed=seed):
            yield Prompt(prompt.text, {"spec": prompt.spec, "category": prompt.spec.category})

    def save(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder)
