"""What SD1.5 and PixArt share: one text encoder, and a network that runs as diffusers has it.

Such a network repeats its time and text projections in every call, and its modules take no routes: one version of a
base is served at a time, with its adapter added to the weights. Its convolutions, and layers that see one row a
picture, round otherwise in a batch, so strict mode runs it one picture at a time on a CPU, too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdm_serve.models.families.base import Family, fused_version, too_long
from tdm_serve.models.families.clip import Reader
from tdm_serve.models.routed import BASE, Variant
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters
from tdm_serve.sampling import Row


class PlainFamily(Family):
    """A loaded base with one version."""

    exact_on_cpu = False
    reader: Reader
    limit: int  # tokens of the longest prompt

    @abstractmethod
    def load_network(self) -> tuple[nn.Module, nn.Module, int]:
        """The network of the base, that network in the backends' signature, and the latents' channels."""

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        assert len(specs) == 1, "the table of families says that versions are not shared"
        network, denoiser, self.channels = self.load_network()
        self.versions = fused_version(network, self.spec, adapters)
        self.denoiser = self.ready(denoiser).eval()

    def tokens(self, prompt: str, truncate: bool = False) -> list[int]:  # noqa: ARG002 - the reader has one length
        return list(self.reader.fitted(prompt, self.limit))

    def count(self, prompt: str) -> int:
        return len(self.reader.ids(prompt))

    def check_prompt(self, prompt: str, param: str = "prompt", truncate: bool = False) -> int:
        if (count := self.count(prompt)) > self.limit and not truncate:
            raise too_long(param, f"{count} tokens, and this checkpoint reads at most {self.limit}")
        return self.reader.length

    def encode(self, prompts: Sequence[Sequence[int]], *, together: bool = False) -> list[Tensor]:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.text_device)
        parts = ids.split(len(prompts) if together else 1)
        return [row.to(self.device, copy=True) for part in parts for row in self.encoded(part)]

    @abstractmethod
    def encoded(self, ids: Tensor) -> Tensor:
        """Features (B, L, D) of ids (B, L)."""

    def refine(self, features: Tensor, length: int, version: Variant = BASE) -> Tensor:  # noqa: ARG002 - one version
        assert length == len(features)
        return features.unsqueeze(0)

    def timed(self, row: Row, text: Tensor, version: Variant = BASE) -> Tensor:  # noqa: ARG002 - needs the time alone
        return torch.full((1, 1, 1), row.t, dtype=torch.float32, device=self.device)
