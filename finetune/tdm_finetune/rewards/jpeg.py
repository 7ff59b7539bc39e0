"""How well a picture compresses: a reward without models, for tests and as a monitor of blur and flat pictures."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from tdm_finetune.rewards.base import Metadata, Reward

QUALITY = 95
SCALE = 500.0  # kB per unit of reward


def jpeg() -> Reward:
    """-(kB of the JPEG at quality 95) / 500, a kB being 1000 bytes; a weight of -1 rewards incompressibility.

    As in DDPO (Black et al. 2023, section 5) and the released Flow-GRPO and DGPO trainers, which divide by 500.
    """
    return compressibility


def compressibility(images: Tensor, _prompts: Sequence[str], _metadata: Sequence[Metadata]) -> Tensor:
    """(B,) scores, at most 0."""
    return torch.tensor([-kilobytes(image) / SCALE for image in images])


def kilobytes(image: Tensor) -> float:
    """Size of one picture (H, W, 3) as JPEG at quality 95."""
    buffer = BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
