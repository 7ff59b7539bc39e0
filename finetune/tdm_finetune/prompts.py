"""Where a trainer's prompts come from: the world of its checkpoint, or a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from tdm_finetune.trainee import Prompt, Trainee
from tdm_serve.errors import ConfigError, TdmServeError

LOOKED_AT = 10_000  # prompts of an endless stream after which a category is taken to be absent


def stream(
    trainee: Trainee, source: Path | None, categories: tuple[str, ...], split: str, seed: int
) -> Iterator[Prompt]:
    """An endless, deterministic stream of prompts; of `categories` only, where any are named.

    `source` is a text file (one prompt a line) or JSON lines with "prompt" and whatever rewards want to know; it is
    gone through in another order each time. Without one the prompts are the checkpoint's own world's.
    Raises ConfigError for an unusable file or an unknown category.
    """
    found = trainee.prompts(split, seed) if source is None else _shuffled(read_prompts(source), seed)
    return _only(found, categories) if categories else found


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .txt or .jsonl file; ConfigError names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path} cannot be read: {error}") from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".jsonl":
        found = [_json_line(line, f"{path}, line {n}") for n, line in numbered]
    else:
        found = [Prompt(line, {}) for _, line in numbered]
    if not found:
        raise ConfigError(f'prompts {path} holds no prompt; write one a line, or JSON lines with a key "prompt"')
    return found


def check_prompts(trainee: Trainee, source: Path | None) -> None:
    """Raises ConfigError for a prompt of a file that the checkpoint cannot read whole: now, not hours into a run."""
    for prompt in read_prompts(source) if source is not None else ():
        try:
            trainee.check_prompt(prompt.text)
        except TdmServeError as error:
            raise ConfigError(
                f"prompts {source}: {prompt.text[:60]!r} cannot be used: {error}; truncate_prompts cuts those too long"
            ) from error


def _json_line(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
        text = record["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where} is no JSON object with a key "prompt": {error!r}') from error
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f'{where}: "prompt" is {text!r}; it must be a text that is not empty')
    return Prompt(text, record)


def _shuffled(found: list[Prompt], seed: int) -> Iterator[Prompt]:
    for epoch in count():
        for index in np.random.default_rng((seed, epoch)).permutation(len(found)):
            yield found[int(index)]


def _only(found: Iterator[Prompt], categories: tuple[str, ...]) -> Iterator[Prompt]:
    others: set[str] = set()
    misses = 0
    for prompt in found:
        name = str(prompt.metadata.get("category"))
        if name in categories:
            misses = 0
            yield prompt
            continue
        others.add(name)
        misses += 1
        if misses == LOOKED_AT:
            raise ConfigError(
                f"categories {', '.join(categories)} never occur; the prompts have {', '.join(sorted(others))}"
            )
