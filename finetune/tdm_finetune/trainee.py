"""What a trainer needs to know of a model family, and nothing else.

TDM and TDM-R1 are written once against this interface; every family of checkpoints (`zimage.py`, `sd3.py`,
`plain.py`) and the small pixel-space model of the micro world (`micro/`) stand behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tdm_finetune.process import Process
from tdm_finetune.scoring import World
from tdm_serve.models.lora import Lora

Conditioning = tuple[Tensor, ...]  # what the network takes beside latents and level; every tensor starts with (B, ...)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as trainers see it: the text, and what rewards may want to know about it."""

    text: str
    metadata: Mapping[str, Any]

    @property
    def spec(self) -> Any:
        """What the world's checker takes."""
        return self.metadata["spec"]


class Trainee(Protocol):
    """A frozen few-step or multi-step base with everything around it."""

    @property
    def process(self) -> Process: ...

    @property
    def net(self) -> nn.Module:
        """forward(latents (B, C, H, W), level (B,), *conditioning) -> output (B, C, H, W)."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def adapter(self) -> Lora | None:
        """The LoRA of the version that was asked for; the base is loaded without it."""
        ...

    @property
    def component(self) -> str:
        """What stock pipelines call the network, and LoRA files put before its modules' names."""
        ...

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        ...

    @property
    def checkpoint_hash(self) -> str:
        """Digest of the weights of the version that was asked for, adapter included; serving stamps it on pictures."""
        ...

    @property
    def world(self) -> World | None:
        """What checks its pictures; None for a model of the real world."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated layers of `net`: what is recomputed or spread over processes one by one."""
        ...

    def linears(self) -> dict[str, nn.Linear]:
        """The linears that adapters go on, by the name that an adapter file gives them, in a fixed order."""
        ...

    def check_prompt(self, prompt: str) -> None:
        """Raises a TdmServeError for a prompt that `encode` could not read whole. Reads no weights."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts as the network takes them; "" is the unconditional one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 pictures (B, H, W, 3) on the CPU from clean latents (B, C, H, W)."""
        ...

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        """The endless, deterministic stream of the prompts of the world that this model was trained on."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the network with its present weights as a folder that the family's own loader reads."""
        ...
