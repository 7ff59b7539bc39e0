"""A look at clean latents that costs next to nothing: a linear map of each latent cell to one colour.

The map belongs to an autoencoder: `(channels + 1, 3)`, the last row an offset, from normalised latents to 8-bit RGB.
`tdm-serve finetune preview` fits it on true pictures and stores it in the checkpoint's manifest. For a checkpoint
without one it is fitted when the model loads, on blocks of random colours that its own encoder sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Matrix = tuple[tuple[float, float, float], ...]


def picture(latents: Tensor, matrix: Matrix, factor: int) -> Image.Image:
    """Normalised latents (1, C, h, w) as a picture of (w * factor, h * factor) pixels, bicubic between cells."""
    cells = latents[0].float().cpu().numpy()  # (C, h, w)
    channels, height, width = cells.shape
    colours = np.asarray(matrix, dtype=np.float32)
    rgb = cells.reshape(channels, -1).T @ colours[:-1] + (colours[-1] + 0.5)  # (h * w, 3)
    pixels = np.fmin(np.fmax(rgb, 0), 255).astype(np.uint8)  # fmax takes what is no number for 0
    small = Image.frombytes("RGB", (width, height), pixels.tobytes())
    return small.resize((width * factor, height * factor), Image.Resampling.BICUBIC)


def fit(latents: Tensor, pictures: Tensor) -> Matrix:
    """The least-squares map from latents (B, C, h, w) to the cell averages of pictures (B, 3, H, W) in 0 to 255."""
    averages = F.adaptive_avg_pool2d(pictures.double(), (latents.shape[-2], latents.shape[-1]))
    cells = _columns(latents.double())
    design = torch.cat((cells, cells.new_ones(len(cells), 1)), dim=1)  # (B * h * w, C + 1)
    solved: Sequence[Sequence[float]] = torch.linalg.lstsq(design, _columns(averages)).solution.tolist()
    return tuple((round(r, 3), round(g, 3), round(b, 3)) for r, g, b in solved)


def _columns(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2).cpu()


def colour_blocks(count: int = 16, side: int = 64, block: int = 16) -> Tensor:
    """Pictures (count, 3, side, side) in 0 to 255 of square blocks, each of one random colour; always the same ones."""
    random = torch.Generator("cpu").manual_seed(0)
    colours = torch.randint(0, 256, (count, 3, side // block, side // block), generator=random)
    return colours.float().repeat_interleave(block, 2).repeat_interleave(block, 3)
