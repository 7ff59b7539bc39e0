"""Encoded prompts that are kept: the text stage costs one evaluation's time, and users repeat themselves.

A key holds everything that the stored tensor depends on: the text encoder's hash, the prompt as token ids, the fixed
padded length at which it was encoded and, for text that a version's own layers have refined, the version, the strength
of its adapter and the padded length. Token ids are the only normalisation that cannot change a picture: prompts that
the tokenizer reads alike share an entry (NFC and NFD for a tokenizer that normalises, not for others), and no other
prompts do. A stored tensor is the one that was computed, so a hit gives the same picture, bit by bit.

Tensors stay on the device that made them. One thread stores; any thread may look and read the counters.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from tdm_serve.errors import ConfigError

DEFAULT_MB = 64.0
MIB = 2**20


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a moment. Every start looks up each different text once, however many pictures want it."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    limit_bytes: int


class PromptCache:
    """Least recently used tensors within `limit_mb` MiB; 0 keeps nothing."""

    def __init__(self, limit_mb: float = DEFAULT_MB) -> None:
        if not 0 <= limit_mb < float("inf"):
            raise ConfigError(f"the prompt cache's size is {limit_mb} MB; it must be a number of at least 0")
        self.limit_bytes = int(limit_mb * MIB)
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether a key is there; neither counted nor noted as a use."""
        with self._lock:
            return key in self._kept

    def get(self, key: Hashable, *, counted: bool = True) -> Tensor | None:
        """The tensor of a key, which becomes the latest used one."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            self._hits += counted and found is not None
            self._misses += counted and found is None
            return found

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keeps a tensor that owns its memory; the longest unused ones go until all fit. One too large is not kept."""
        with self._lock:
            if value.nbytes > self.limit_bytes:
                return
            if (old := self._kept.pop(key, None)) is not None:
                self._bytes -= old.nbytes
            self._kept[key] = value
            self._bytes += value.nbytes
            while self._bytes > self.limit_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.nbytes
                self._evictions += 1

    def clear(self) -> None:
        """Forgets every tensor; the counters stay."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def stats(self) -> CacheStats:
        """All counters of one moment."""
        with self._lock:
            counts = (self._hits, self._misses, self._evictions, len(self._kept), self._bytes)
            return CacheStats(*counts, self.limit_bytes)

    @property
    def hits(self) -> int:
        return self.stats().hits

    @property
    def misses(self) -> int:
        return self.stats().misses

    @property
    def evictions(self) -> int:
        return self.stats().evictions

    @property
    def bytes(self) -> int:
        return self.stats().bytes
