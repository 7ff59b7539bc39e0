"""Draws docs/samples.png: the same prompts and seeds through teacher, TDM and TDM-R1, two rows each."""

from __future__ import annotations

from pathlib import Path

import harness  # noqa: F401 - first: it sets the OpenMP policy before torch loads
import numpy as np
import torch
from PIL import Image

from tdm_finetune.paint import sheet
from tdm_serve import Pipeline

PROMPTS = (
    "a star",
    "two red circles",
    "a blue ring left of a yellow star",
    "three green triangles",
    "a white cross and a purple square",
    'the word "GO" in orange',
    "a cyan disc above a red box",
)
TARGET = Path(__file__).resolve().parent.parent / "docs" / "samples.png"


def main() -> None:
    pictures = [
        np.asarray(image.image)
        for model in ("default-teacher", "default-tdm", "default")
        for seed in (0, 100)
        for image in Pipeline.from_pretrained(model)(list(PROMPTS), seed=seed)
    ]
    Image.fromarray(sheet(torch.from_numpy(np.stack(pictures)), columns=len(PROMPTS))).save(TARGET)
    print(TARGET)


if __name__ == "__main__":
    main()
