"""A checkpoint of any family as trainers see it: its network unpacked, its own text encoders and autoencoder.

The family's class of the serving side does what it does there: it reads prompts, encodes them, decodes latents. Only
its network is left as diffusers has it, so that adapters go on, and come out, under their usual names. A family adds
three things: the network in the trainers' signature (latents, level, text), its repeated blocks, and the modules that
adapters usually go on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdm_finetune.choices import TEXT_CACHE_MB, Choices, adapted, no_prompts, picture_size, process, starting_adapter
from tdm_finetune.scoring import World
from tdm_finetune.trainee import Conditioning, Prompt
from tdm_serve.models.families.base import Family
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.lora import base_of
from tdm_serve.models.placement import Placement
from tdm_serve.models.quiet import quiet_bars
from tdm_serve.models.spec import ModelSpec
from tdm_serve.prompt_cache import PromptCache


class Unpacked:
    """Goes before a family in its subclass's bases: the network stays as `load_network` gives it."""

    load_network: Any

    def load_denoiser(self, *_: Any) -> None:
        """In place of the family's own, which adds adapters and joins projections for inference."""
        self.network, self.denoiser, self.channels = self.load_network()


class FamilyTrainee(ABC):
    """A loaded base as a `Trainee`; its parts for text and pictures stay on the device that they were loaded to."""

    kind: ClassVar[type[Family]]  # of `Unpacked` and the family
    usual: ClassVar[tuple[str, ...]]  # modules that adapters go on
    world: World | None = None  # what is published draws everything: no checker knows it

    def __init__(
        self,
        spec: ModelSpec,
        files: Sequence[Path],
        choices: Choices,
        device: torch.device,
        placement: Placement | None = None,
    ) -> None:
        """Reads everything. ConfigError for choices that do not fit; for files it raises as the SDK's loader does.

        `placement` is for parts that do not come from files.
        """
        self.spec, self.truncate = spec, choices.truncate
        self.picture_size = picture_size(spec, choices)
        self.process = process(spec, choices)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        with quiet_bars():
            self.family: Any = self.kind([spec], placement or Placement(device, dtype, device, choices.held))
        self.network: Any = self.family.network
        self.component = base_of(self.network, str(spec.base)).component
        self.adapter = starting_adapter(spec, self.network)
        self._linears = adapted(self.network, choices, self.adapter, self.usual)
        self.net: nn.Module = self.wrapped()
        width, height = (side // self.family.factor for side in self.picture_size)
        self.latent_shape = (int(self.family.channels), height, width)
        self.checkpoint_hash = checkpoint_hash(spec, files)
        self._texts = PromptCache(TEXT_CACHE_MB)

    @abstractmethod
    def wrapped(self) -> nn.Module:
        """The network as `Trainee.net`."""

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]: ...

    def linears(self) -> dict[str, nn.Linear]:
        return self._linears

    def check_prompt(self, prompt: str) -> None:
        self.family.check_prompt(prompt, truncate=self.truncate)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text features (B, L, D) on the CPU. Each prompt is encoded once and alone, so it never depends on others."""
        return (torch.stack([self._encoded(prompt) for prompt in prompts]),)

    def _encoded(self, prompt: str) -> Tensor:
        if (found := self._texts.get(prompt)) is not None:
            return found
        self.check_prompt(prompt)
        [features] = self.family.encode([self.family.tokens(prompt, self.truncate)])
        self._texts.put(prompt, features.cpu())
        return features.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.family.decode(latents.to(self.family.device, torch.float32).split(1))

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:  # noqa: ARG002 - there are none
        raise no_prompts(self.spec.id)

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
