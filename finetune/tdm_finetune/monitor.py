"""Numbers that show when pictures leave the world they should come from: no reward looks at them.

A generator that games its reward pays elsewhere: its pictures blur, drift in colour or grow noisy (`palette_error`
rises), become all alike (`diversity` falls) or hold more or less than pictures of this world do (`compressibility`
moves). Each is judged against the same number of the generator that training started from, or of true pictures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdm_finetune.scenes.world import BACKGROUND, COLOURS

Pictures = NDArray[np.uint8] | Tensor  # uint8 (B, H, W, 3), a tensor on the CPU
Palette = Sequence[tuple[int, int, int]]  # RGB of 0 to 255, the background included

SCENES: Palette = (BACKGROUND, *COLOURS.values())
JPEG_QUALITY = 95


def health(pictures: Pictures, *, palette: Palette | None = SCENES, seeds: int = 1) -> dict[str, float]:
    """What a training log keeps of pictures (B, H, W, 3): `palette_error`, unless there is none, and `compressibility`.

    With `seeds` above 1, `diversity` too: then every `seeds` pictures in a row are of one prompt.
    """
    found = {"compressibility": compressibility(pictures)}
    if palette is not None:
        found["palette_error"] = palette_error(pictures, palette)
    if seeds > 1:
        array = _checked(pictures)
        if len(array) % seeds:
            raise ValueError(f"{len(array)} pictures are no whole groups of {seeds}")
        found["diversity"] = diversity(array.reshape(-1, seeds, *array.shape[1:]))
    return found


def palette_error(pictures: Pictures, palette: Palette = SCENES) -> float:
    """Mean squared distance of a pixel of (B, H, W, 3) to the nearest palette colour, with RGB in [0, 1].

    Lower is cleaner; blur, drifting colours and noise raise it. Three channels are summed, so noise of standard
    deviation s gives about 3 s². True scenes have about 7e-4, all of it from the anti-aliased pixels along edges.
    """
    colours = np.asarray(palette, dtype=np.float32) / np.float32(255)  # (C, 3)
    total, pixels = 0.0, 0
    for picture in _checked(pictures):
        flat = picture.reshape(-1, 3).astype(np.float32) / np.float32(255)
        distances = np.square(flat).sum(1)[:, None] - 2 * flat @ colours.T + np.square(colours).sum(1)
        total += float(distances.min(1).clip(0).sum(dtype=np.float64))
        pixels += len(flat)
    return total / pixels


def diversity(pictures: Pictures) -> float:
    """Mean distance of two pictures of the same prompt, over all pairs of (prompts, seeds, H, W, 3).

    The distance is the root of the mean squared difference of two pictures' values, with RGB in [0, 1], so it does not
    depend on their size; 0 is mode collapse. (The method notes' toy world sums squares of values in [-1, 1] instead:
    there 15.4 at 16 x 16 pixels is 0.28 here.)
    """
    array = np.asarray(pictures)
    if array.ndim != 5 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape or array.shape[1] < 2:
        raise ValueError(f"pictures are {array.dtype} {array.shape}; give uint8 (prompts, 2 seeds or more, H, W, 3)")
    seeds = array.shape[1]
    distances: list[float] = []
    for group in array.reshape(len(array), seeds, -1).astype(np.float32) / np.float32(255):
        for first in range(seeds - 1):
            squares = np.square(group[first + 1 :] - group[first]).mean(1, dtype=np.float64)
            distances += np.sqrt(squares).tolist()
    return float(np.mean(distances))


def compressibility(pictures: Pictures) -> float:
    """Mean size of (B, H, W, 3) as JPEG of quality 95, in kB of 1000 bytes: noise and texture raise it."""
    sizes: list[int] = []
    for picture in _checked(pictures):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
        sizes.append(file.tell())
    return float(np.mean(sizes)) / 1000


def _checked(pictures: Pictures) -> NDArray[np.uint8]:
    array = np.asarray(pictures)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
        raise ValueError(f"pictures are {array.dtype} {array.shape}; give uint8 (B, H, W, 3), B at least 1")
    return array
