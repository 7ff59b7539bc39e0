"""The Z-Image family as trainers see it: the dense denoiser, its text encoder and autoencoder, the scene world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from tdm_finetune import scenes
from tdm_finetune.cache import Frozen
from tdm_finetune.choices import TEXT_CACHE_MB, Choices, adapted, no_prompts, picture_size, process, starting_adapter
from tdm_finetune.process import Flow
from tdm_finetune.scoring import SCENES, World
from tdm_finetune.trainee import Conditioning, Prompt
from tdm_serve.models.families.zimage_denoiser import Block, ZImageDenoiser
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.lora import Lora
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import ModelSpec
from tdm_serve.prompt_cache import PromptCache

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
    return adapted(transformer, Choices(), None, TARGETS)


def repeated(denoiser: ZImageDenoiser) -> list[nn.Module]:
    """Its blocks, behind the parts of them that `ZImageDenoiser.modulation` calls from outside of the blocks."""
    blocks = [cast(Block, block) for block in (*denoiser.image_blocks, *denoiser.text_blocks, *denoiser.blocks)]
    return [*(block.modulation for block in blocks if block.modulation is not None), *blocks]


class ZImageTrainee:
    """A Z-Image transformer with its frozen parts as a `Trainee`; `adapter` belongs to it and is not yet applied."""

    component = "transformer"

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        frozen: Frozen,
        *,
        shift: float,
        picture_size: tuple[int, int],
        text_tokens: int,
        truncate: bool = False,
        targets: Mapping[str, nn.Linear] | None = None,
        adapter: Lora | None = None,
        checkpoint_hash: str = "",
    ) -> None:
        self.transformer, self.frozen = transformer, frozen
        self.text_tokens = text_tokens
        self.adapter, self.checkpoint_hash, self.picture_size = adapter, checkpoint_hash, picture_size
        self.world: World | None = SCENES if frozen.reads_scenes else None
        self.truncate = truncate and self.world is None  # scenes end in markers
        self.denoiser = ZImageDenoiser(transformer)
        self.net: nn.Module = VelocityNet(self.denoiser)
        self.process = Flow(shift)
        width, height = (side // frozen.factor for side in picture_size)
        self.latent_shape = (frozen.channels, height, width)
        self._linears = dict(linears(transformer) if targets is None else targets)
        self._texts = PromptCache(TEXT_CACHE_MB)

    def blocks(self) -> Sequence[nn.Module]:
        return repeated(self.denoiser)

    def base(self, latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The network with its own weights, as a `paint.Network`."""
        return self.net(latents, level, *conditioning)

    def linears(self) -> dict[str, nn.Linear]:
        return self._linears

    def check_prompt(self, prompt: str) -> None:
        self.frozen.check(prompt, self.text_tokens, self.truncate)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Features (B, L, D) and token counts (B,) on the CPU.

        Scenes seldom repeat, and their encoder is small; others are encoded once and alone, and kept.
        """
        if self.world is not None:
            return self.frozen.encode(list(prompts), self.text_tokens)
        kept = [self._encoded(prompt) for prompt in prompts]
        padded = [F.pad(one, (0, 0, 0, self.text_tokens - len(one))) for one in kept]
        return torch.stack(padded), torch.tensor([len(one) for one in kept])

    def _encoded(self, prompt: str) -> Tensor:
        if (found := self._texts.get(prompt)) is not None:
            return found
        features, [count] = self.frozen.encode([prompt], self.text_tokens, self.truncate)
        found = features[0, : int(count)].clone()
        self._texts.put(prompt, found)
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.frozen.to_pictures(latents)

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        if self.world is None:
            raise no_prompts("this Z-Image checkpoint")
        return _scenes(split, seed)

    def save(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder)


def load(spec: ModelSpec, files: Sequence[Path], choices: Choices, device: torch.device) -> ZImageTrainee:
    """Everything of a checkpoint; `choices` as for every family."""
    with quiet_bars():
        transformer = ZImageTransformer2DModel.from_pretrained(spec.base / "transformer", dtype=choices.held)
        transformer.eval().requires_grad_(False)
    adapter = starting_adapter(spec, transformer)
    noise = process(spec, choices)
    assert isinstance(noise, Flow), "Z-Image is a flow-matching model"
    return ZImageTrainee(
        transformer,
        Frozen.load(spec.base / "vae", spec.base, device),
        shift=noise.shift,
        picture_size=picture_size(spec, choices),
        text_tokens=choices.text_tokens,
        truncate=choices.truncate,
        targets=adapted(transformer, choices, adapter, TARGETS),
        adapter=adapter,
        checkpoint_hash=checkpoint_hash(spec, files),
    )


def _scenes(split: str, seed: int) -> Iterator[Prompt]:
    for prompt in scenes.prompts(cast(scenes.Split, split), seed=seed):
        yield Prompt(prompt.text, {"spec": prompt.spec, "category": prompt.spec.category})
