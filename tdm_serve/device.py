"""What the device thread asks of an engine. `tdm_serve.engine.Engine` is one; a remote device could be another.

Only `check`, `look`, `examine` and `preview` are called from other threads than the one that owns the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape

if TYPE_CHECKING:
    from PIL import Image


class Underway(Protocol):
    """One picture under way. `clean` is the predicted clean latents (1, C, h, w), replaced by a step, not in place."""

    clean: Any
    nfe: int
    index: int

    @property
    def rows(self) -> Sequence[object]: ...


class PromptCacheNumbers(Protocol):
    """What a prompt cache counts."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Device(Protocol):
    """Several versions of one model on one device."""

    @property
    def infos(self) -> Mapping[str, ModelInfo]: ...
    @property
    def cache(self) -> PromptCacheNumbers: ...

    def examine(self, reference: Any) -> Any: ...
    def add(self, served: Any) -> ModelInfo: ...
    def check(self, request: Request) -> Shape: ...
    def look(self, request: Request) -> tuple[Shape, bool]: ...
    def start(self, requests: Sequence[Request]) -> Sequence[Underway]: ...
    def step(self, samples: Sequence[Any]) -> None: ...
    def finish(self, samples: Sequence[Any]) -> list[GeneratedImage]: ...
    def preview(self, latents: Any) -> Image.Image: ...
    def out_of_memory(self, error: BaseException) -> bool: ...
    def empty_cache(self) -> None: ...
