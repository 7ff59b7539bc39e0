"""Where pictures go: file names decided, and proved writable, before any model is loaded.

`-o` is a file (`circles.png`), a folder (`pictures/`), or a name with fields (`{slug}-{seed}.png`). Several pictures to
one file name are numbered: `circles-1.png`, `circles-2.png`. Names that we choose never replace a file; a name that the
user gave does.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tdm_serve.errors import OutputError

SUFFIX = ".png"
MAX_SLUG = 60  # characters; the whole name must fit a file system's 255 bytes
FIELDS = ("index", "seed", "slug")

Picture = tuple[str, int]  # prompt, seed


def slug(prompt: str) -> str:
    """The prompt as part of a file name: letters and digits of any script, joined by hyphens."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    words = re.sub(r"[\W_]+", "-", text).strip("-")[:MAX_SLUG]
    while len(words.encode()) > 2 * MAX_SLUG:
        words = words[:-1]
    return words.strip("-") or "picture"


def plan(output: str | None, pictures: Sequence[Picture]) -> list[Path]:
    """One path per picture, each proved writable. Raises OutputError; leaves nothing behind."""
    try:
        if output is None or _is_folder(output):
            folder = Path(output or ".")
            _check_folder(folder)
            return _unused(folder, pictures)
        paths = _named(output, pictures)
        for path in paths:
            _check_file(path)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    return paths


def make_folder(folder: Path) -> None:
    """Makes the folder of a planned path, unless it is there."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def _is_folder(output: str) -> bool:
    path = Path(output)
    return path.is_dir() or output.endswith(("/", os.sep)) or not (path.suffix or "{" in output or path.exists())


def _unused(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Names from prompt and seed that neither exist nor repeat."""
    paths: list[Path] = []
    for prompt, seed in pictures:
        stem, number = f"{slug(prompt)}-{seed}", 1
        path = folder / f"{stem}{SUFFIX}"
        while path.exists() or path in paths:
            number += 1
            path = folder / f"{stem}-{number}{SUFFIX}"
        paths.append(path)
    return paths


def _named(output: str, pictures: Sequence[Picture]) -> list[Path]:
    """Names that the user gave: with fields, numbered, or as they are."""
    if Path(output).suffix.lower() != SUFFIX:
        raise OutputError(
            f"cannot write {output}: pictures are PNG; allowed: a file name ending in {SUFFIX}, or a folder"
        )
    if "{" in output:
        return _filled(output, pictures)
    path = Path(output)
    if len(pictures) == 1:
        return [path]
    width = len(str(len(pictures)))
    return [path.with_stem(f"{path.stem}-{number:0{width}}") for number in range(1, len(pictures) + 1)]


def _filled(pattern: str, pictures: Sequence[Picture]) -> list[Path]:
    try:
        paths = [
            Path(pattern.format(index=number, seed=seed, slug=slug(prompt)))
            for number, (prompt, seed) in enumerate(pictures, start=1)
        ]
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        allowed = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise OutputError(f"cannot use {pattern!r} as a file name: {error}; allowed fields: {allowed}") from error
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise OutputError(f"{pattern!r} gives {count} pictures the same name {path}; add {{index}} to it")
    return paths


def _check_folder(folder: Path) -> None:
    """The folder is there and writable, or can be made in its parent."""
    place = folder if folder.exists() else folder.parent
    if not place.is_dir():
        raise OutputError(f"cannot write into {folder}: there is no folder {place}")
    _try_file(place, "tdm-serve", folder)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    _try_file(path.parent, path.name, path)


def _try_file(folder: Path, name: str, wanted: Path) -> None:
    """Permission bits do not tell (root, read-only mounts, long names), so this does what the writer will do."""
    try:
        handle, probe = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    except OSError as error:
        raise OutputError(f"cannot write {wanted}: {error.strerror or error}") from error
    os.close(handle)
    Path(probe).unlink()
