"""Programs that read text in pictures: Tesseract from the system, or PaddleOCR where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tdm_serve.errors import ConfigError

Layout = Literal["line", "page"]
Reader = Callable[[NDArray[np.uint8]], list[str]]  # pictures uint8 (B, H, W, 3) -> B texts

LINE_SIDE = 384  # pixels of a picture's short side before its line of text is cut out; 3 x for a scene
PAGE_SIDE = 768
PAD = 24  # white pixels around the cut-out; Tesseract fails on letters that touch the border
INK = 60.0  # RGB distance from the background that makes a pixel part of a letter
TIMEOUT_S = 120.0
PAGE_SEGMENTATION = {"line": "7", "page": "11"}  # Tesseract's names: one line of text; text wherever there is some


def tesseract(layout: Layout, language: str, processes: int | None = None) -> Reader:
    """Reads with the `tesseract` program, many pictures a process: starting it takes longer than reading.

    On true scenes of the text category it reads 97 % right at 7 ms a picture; what fails is mostly a lone "I".
    """
    program = shutil.which("tesseract")
    if program is None:
        raise ConfigError(
            "the reward 'ocr' reads with Tesseract, which is not on the PATH; install it "
            "(Debian and Ubuntu: apt-get install tesseract-ocr) or choose ocr(reader=paddle)"
        )
    _check_language(program, language)
    if processes is not None and processes < 1:
        raise ConfigError(f"ocr: processes is {processes}; it must be at least 1")
    lanes = processes or os.cpu_count() or 1
    command = [program, "stdin", "stdout", "--psm", PAGE_SEGMENTATION[layout], "--dpi", "300", "-l", language]

    def read(pictures: NDArray[np.uint8]) -> list[str]:
        prepared = [prepare(picture, layout) for picture in pictures]
        there = [(i, image) for i, image in enumerate(prepared) if image is not None]  # it reads "Oo" in blank ones
        texts = [""] * len(prepared)
        chunks = [there[lane::lanes] for lane in range(lanes) if there[lane::lanes]]
        with ThreadPoolExecutor(max(1, len(chunks))) as threads:
            for chunk, found in zip(chunks, threads.map(partial(_run, command), chunks), strict=True):
                for (index, _), text in zip(chunk, found, strict=True):
                    texts[index] = text
        return texts

    return read


def paddle(layout: Layout, language: str) -> Reader:
    """Reads with PaddleOCR 2 or 3, which is not part of tdm-serve's extras because it brings its own framework."""
    try:
        from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports] - an optional package
    except ImportError as error:
        raise ConfigError(
            "the reward 'ocr' with reader=paddle needs PaddleOCR; run: pip install paddleocr paddlepaddle"
        ) from error
    model: Any = PaddleOCR(
        lang="en" if language == "eng" else language,
        use_doc_orientation_classify=False,  # these three are steps of version 3 for photographed documents
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )

    def read(pictures: NDArray[np.uint8]) -> list[str]:
        prepared = (prepare(picture, layout) for picture in pictures)
        return ["" if image is None else _paddle_text(model, np.asarray(image.convert("RGB"))) for image in prepared]

    return read


def prepare(picture: NDArray[np.uint8], layout: Layout) -> Image.Image | None:
    """A greyscale picture that a reader can read; None where a line is asked for and the picture is blank.

    "line": distance from the background (the border's median colour) as darkness, cut to the ink, enlarged.
    """
    if layout == "page":
        return _enlarged(Image.fromarray(picture).convert("L"), min(picture.shape[:2]), PAGE_SIDE)
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    distance = np.linalg.norm(picture.astype(np.float32) - np.median(border, axis=0), axis=-1)  # (H, W)
    ink = distance > INK
    if not ink.any():
        return None
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    grey = 255 - distance / distance.max() * 255
    cut = grey[max(rows[0] - 4, 0) : rows[-1] + 5, max(columns[0] - 4, 0) : columns[-1] + 5]
    image = _enlarged(Image.fromarray(cut.astype(np.uint8)), min(picture.shape[:2]), LINE_SIDE)
    return ImageOps.expand(image, PAD, 255)


def _enlarged(image: Image.Image, side: int, wanted: int) -> Image.Image:
    scale = max(1, round(wanted / side))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)


def _run(command: Sequence[str], chunk: Sequence[tuple[int, Image.Image]]) -> list[str]:
    """One process for all pictures of a chunk, as the pages of one TIFF."""
    images = [image for _, image in chunk]
    buffer = BytesIO()
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:])
    answer = subprocess.run(
        command,
        input=buffer.getvalue(),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},  # its own threads cost more than they bring on small pictures
    )
    pages = pages_of(answer.stdout.decode(errors="replace"), len(images))
    if answer.returncode or len(pages) != len(images):
        problem = answer.stderr.decode(errors="replace").strip()[-300:]
        raise RuntimeError(
            f"tesseract ended with {answer.returncode} and {len(pages)} of {len(images)} pages: {problem}"
        )
    return [page.strip() for page in pages]


def pages_of(text: str, wanted: int) -> list[str]:
    """The pages of Tesseract's answer: version 5 puts a form feed between them, version 4 one behind each.

    So a form feed at the end is a last page without text in the one, and the end of it in the other.
    """
    pages = text.split("\f")
    return pages[:-1] if len(pages) == wanted + 1 and not pages[-1] else pages


def _check_language(program: str, language: str) -> None:
    answer = subprocess.run([program, "--list-langs"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    installed = answer.stdout.split("\n")[1:]
    missing = [code for code in language.split("+") if code not in installed]
    if missing:
        raise ConfigError(
            f"Tesseract has no language {missing[0]!r}; installed: {', '.join(filter(None, installed))} "
            f"(Debian and Ubuntu: apt-get install tesseract-ocr-{missing[0]})"
        )


def _paddle_text(model: Any, picture: NDArray[np.uint8]) -> str:
    """All lines together. `predict` is PaddleOCR 3, `ocr` PaddleOCR 2."""
    if hasattr(model, "predict"):
        return "".join(line for page in model.predict(picture) for line in page["rec_texts"])
    pages: Iterable[Any] = model.ocr(picture, cls=False)
    return "".join(line[1][0] for page in pages for line in page or [])
