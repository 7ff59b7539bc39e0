"""A published model at full size with random weights, as a trainee: what training costs does not depend on weights.

Prompts become random features, so that no text encoder is built: a run reads each prompt once and keeps it.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from tdm_finetune.choices import Choices
from tdm_finetune.sd3 import PartsOfSD3, SD3Trainee
from tdm_finetune.trainee import Prompt
from tdm_serve.errors import BackendUnavailable, ConfigError
from tdm_serve.models.architectures import architecture_of, parts
from tdm_serve.models.entries import catalogue
from tdm_serve.models.placement import Placement
from tdm_serve.models.random_weights import random_specs

SIZES = {"sd35-medium": "sd35-medium-tdm"}  # --size -> the catalogue's entry, of the SD3 family
CLIP_TOKENS = 77
GB = 2**30


class WithoutText(PartsOfSD3):
    """SD3 with neither tokenizers nor text encoders."""

    def load_text(self) -> None:
        self.length = CLIP_TOKENS + self.spec.max_prompt_tokens + 1  # as with them


class RandomTrainee(SD3Trainee):
    """Every prompt is as random as its text."""

    kind = WithoutText

    def check_prompt(self, prompt: str) -> None:
        """Every text is read."""

    def _encoded(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        features = torch.randn(self.family.length, max(self.family.width, self.family.pooled), generator=generator)
        return features.to(self.family.dtype)

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        return (Prompt(f"{split} {seed} {number}", {}) for number in count())


@contextmanager
def random_trainee(size: str, side: int, device: torch.device) -> Generator[RandomTrainee]:
    """A size of `SIZES` for pictures of `side` pixels, or with `:tiny` behind it for its own small ones.

    Raises ConfigError for an unknown one, and BackendUnavailable where it cannot run for want of a GPU or of memory.
    """
    name, _, tiny = size.partition(":")
    if name not in SIZES or tiny not in ("", "tiny"):
        raise ConfigError(f"size {size!r} is unknown; choose {', '.join(SIZES)}, with :tiny behind it for a test")
    if not tiny:
        check_memory(name, device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with random_specs([SIZES[name] + (":tiny" if tiny else "")]) as [spec]:
        placement = Placement(device, dtype, text=device, fine=dtype, random=True)
        yield RandomTrainee(spec, [], Choices(size=0 if tiny else side), device, placement)


def check_memory(name: str, device: torch.device) -> None:
    """Raises BackendUnavailable without a GPU, or with one whose free memory does not even hold the weights."""
    if device.type != "cuda":
        raise BackendUnavailable(
            f"{name} at full size needs a CUDA GPU, and torch {torch.__version__} sees none; "
            f"{name}:tiny goes the same way on any machine"
        )
    base = catalogue()[SIZES[name]].base
    assert base is not None
    described = architecture_of(base.repo).parts
    needed = 2 * sum(parts()[described[part]].parameters for part in ("transformer", "vae"))  # bytes, in bfloat16
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise BackendUnavailable(
            f"the weights of {name} take {needed / GB:.1f} GB, and {free / GB:.1f} GB of {device} are free"
        )
