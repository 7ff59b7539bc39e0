"""Reads the letters of pictures with Tesseract, the system's program: dark ink on white, one process per batch."""

from __future__ import annotations

import io
import os
import shutil
import string
import subprocess
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdm_finetune.scenes.render import Pixels
from tdm_serve.errors import BackendUnavailable

PROGRAM = "tesseract"
HINT = f"the program {PROGRAM} is not installed (Debian, Ubuntu: apt-get install tesseract-ocr)"
LINE, WORD = 7, 8  # page segmentation modes
INK = 0.4  # share of the strongest contrast that counts as ink when the crop is chosen
FAINT = 30.0  # RGB distance from the background below which nothing is written
BORDER = 20  # white pixels around the crop; Tesseract wants some
TIMEOUT_S = 120.0


def available() -> bool:
    return shutil.which(PROGRAM) is not None


def version() -> str | None:
    """Tesseract's version, for records; None if it is not installed."""
    if not available():
        return None
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return done.stdout.partition("\n")[0].removeprefix(PROGRAM).strip()


def read(pictures: Sequence[Pixels]) -> list[str]:
    """The capitals that each picture shows, "" where none can be made out.

    A line is tried first, which reads best; the few pictures that give nothing, mostly single letters, are read
    once more as a word. Raises BackendUnavailable if Tesseract is missing or fails.
    """
    pages = [page(picture) for picture in pictures]
    written = [index for index, image in enumerate(pages) if image is not None]
    texts = [""] * len(pages)
    for mode in (LINE, WORD):
        open_pages = [index for index in written if not texts[index]]
        images = [image for index in open_pages if (image := pages[index]) is not None]
        for index, text in zip(open_pages, _recognise(images, mode), strict=True):
            texts[index] = text
    return texts


def page(picture: Pixels) -> Image.Image | None:
    """Contrast with the border's colour as black on white, cropped to the ink; None for an empty picture."""
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    contrast = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    top = float(np.percentile(contrast, 99.5))
    if top < FAINT:
        return None
    ink: NDArray[np.float32] = (contrast / top).clip(0, 1)
    rows, columns = np.flatnonzero((ink > INK).any(1)), np.flatnonzero((ink > INK).any(0))
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Image.fromarray(np.pad(np.rint(255 * (1 - crop)).astype(np.uint8), BORDER, constant_values=255))


def _recognise(pages: Sequence[Image.Image], mode: int) -> list[str]:
    """The text of each page; all go through one process as one many-page file."""
    if not pages:
        return []
    if not available():
        raise BackendUnavailable(f"reading letters is not possible here: {HINT}")
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    command = [PROGRAM, "stdin", "stdout", "--psm", str(mode), "--dpi", "300"]
    command += ["-c", f"tessedit_char_whitelist={string.ascii_uppercase}"]
    done = subprocess.run(
        command,
        input=file.getvalue(),
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},  # faster for such small pages, and leaves the other cores alone
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    texts = ["".join(text.split()) for text in done.stdout.decode(errors="replace").split("\f")][: len(pages)]
    if done.returncode or len(texts) != len(pages):
        complaint = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise BackendUnavailable(f"{PROGRAM} read {len(texts)} of {len(pages)} pages and said: {complaint}")
    return texts
