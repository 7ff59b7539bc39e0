"""Compressibility: -(kB at quality 95) / 500."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from tdm_finetune.rewards import load_reward


def test_hand_computed() -> None:
    flat = np.full((64, 64, 3), 90, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes: list[int] = []
    for picture in (flat, noise):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    scores = load_reward("jpeg")(torch.from_numpy(np.stack([flat, noise])), ["a", "b"], [{}, {}])
    torch.testing.assert_close(scores, torch.tensor([-size / 1000 / 500 for size in sizes]))
    assert -0.002 < scores[0] < 0 and scores[1] < 5 * scores[0]
