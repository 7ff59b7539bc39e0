"""Prompts as token ids of one tokenizer at one fixed length, as diffusers' pipelines of CLIP and T5 read them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tdm_serve.errors import CheckpointError

KEPT_PROMPTS = 1024  # prompts whose token ids are kept: a request's are wanted by its check and again by its start
LONG_PROMPT = 4096  # characters; longer ones are not worth keeping


class Reader:
    """One tokenizer. It never pads or cuts by itself: it would remember to, and one thread's check change another's."""

    def __init__(self, folder: Path, length: int | None = None) -> None:
        """`length` is of every text, in tokens; by default as many as the tokenizer says that its encoder reads."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.length = int(self.tokenizer.model_max_length) if length is None else length
        if self.length > LONG_PROMPT:  # transformers' stand-in for "not said" is a huge number
            raise CheckpointError(f"{folder / 'tokenizer_config.json'} must say model_max_length, such as 77 for CLIP")
        self._kept = lru_cache(KEPT_PROMPTS)(self._read)
        self.ids("")  # clears the padding that a tokenizer's file may ask for, before threads share it

    def ids(self, prompt: str) -> tuple[int, ...]:
        """All token ids of a prompt, special ones included. Safe from any thread."""
        return self._kept(prompt) if len(prompt) <= LONG_PROMPT else self._read(prompt)

    def _read(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt, verbose=False)["input_ids"])

    def fitted(self, prompt: str, limit: int | None = None) -> tuple[int, ...]:
        """Exactly `length` ids: padded, and cut to `limit`, which is `length` by default, with the last one kept."""
        ids, most = self.ids(prompt), self.length if limit is None else min(limit, self.length)
        if len(ids) > most:
            ids = (*ids[: most - 1], ids[-1])
        return (*ids, *[self.tokenizer.pad_token_id] * (self.length - len(ids)))
