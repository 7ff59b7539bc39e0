"""Captions as PixArt's stock pipeline cleans them before they are tokenised, which is its default.

Case, links, markup, file names, sizes such as 512x512, CJK characters and brackets go; the model was trained on such
captions. The rules are diffusers' own.
"""

from __future__ import annotations

import threading
import warnings
from functools import lru_cache
from typing import Any

from bs4 import MarkupResemblesLocatorWarning
from diffusers import PixArtAlphaPipeline

LONGEST = 2048  # characters that are looked at; some of the rules take time that grows with the square of the length
KEPT = 1024

_rules: Any = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)  # the rules are methods, and need nothing of it
_warnings = threading.Lock()  # switching them is not thread-safe


@lru_cache(KEPT)
def cleaned(caption: str) -> str:
    """A caption of at most `LONGEST` characters, cleaned. Safe from any thread."""
    assert len(caption) <= LONGEST
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption may look like a file's name
        [result] = _rules._text_preprocessing(caption, clean_caption=True)  # noqa: SLF001
    return result
