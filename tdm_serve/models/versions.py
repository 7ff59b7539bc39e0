"""Which versions of a base are in memory: loaded when asked for, unloaded least recently used first.

A version is small beside its base, but twenty adapters of a large one are not. One that pictures under way still need
is never unloaded; if all are, the budget is exceeded until one of them is free.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.adapters import read_adapters
from tdm_serve.models.lora import Base, Delta
from tdm_serve.models.routed import Routed, Thin
from tdm_serve.models.spec import Adapter

logger = logging.getLogger(__name__)

Adapters = Literal["fused", "separate"]
MIB = 2**20


@dataclass(frozen=True, slots=True)
class VersionStats:
    """Counters of a moment; `bytes` are what the loaded versions hold beside the shared base."""

    loads: int
    unloads: int
    bytes: int
    limit_bytes: int | None
    held: Mapping[str, int]  # bytes by version, the latest used one last

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self.held)


class Versions:
    """The versions of one base. One thread loads and unloads; any thread may read the counters."""

    def __init__(
        self,
        base: Base,
        shared: Mapping[str, Routed],
        versions: Mapping[str, Sequence[Adapter]],
        adapters: Adapters = "fused",
    ) -> None:
        """`shared` are those of the base's linears that adapters may change, by name; `versions` have adapters or none.

        A single version has none here, because its adapters are in the base weights.
        """
        if adapters not in ("fused", "separate"):
            raise ConfigError(f"adapters is {adapters!r}; it must be fused or separate")
        self.limit_bytes: int | None = None
        self._base, self._shared, self._versions, self._adapters = base, shared, dict(versions), adapters
        self._bytes: OrderedDict[str, int] = OrderedDict()  # of those in memory, the latest used one last
        self._loads = self._unloads = 0
        self._lock = threading.Lock()

    def separate(self, version: str) -> bool:
        """Whether a version's adapter is kept apart from the weights, so that requests choose its strength."""
        return self._adapters == "separate" and bool(self._versions[version])

    def limit(self, memory_mb: float | None) -> None:
        """Sets the budget in MiB, and loads every version once, so that a broken or too large one is known now."""
        if memory_mb is not None and not 0 < memory_mb < float("inf"):
            raise ConfigError(f"memory_mb is {memory_mb}; it must be a positive number")
        self.limit_bytes = None if memory_mb is None else int(memory_mb * MIB)
        for version in reversed(self._versions):  # so that the default is the latest used one
            self.use(version)
            self._check_fits(version)

    def add(self, version: str, adapters: Sequence[Adapter], busy: Collection[str] = ()) -> None:
        """One more version, loaded at once; nothing has changed where that fails.

        Raises CheckpointError for adapters that do not fit, ConfigError where they are larger than the whole budget or
        where a single version was loaded, whose adapters are in the base weights.
        """
        if not self._shared:
            raise ConfigError("this base was loaded for one version alone; load it with `growing` to add others")
        assert version not in self._versions, "a version's name is never used twice"
        self._versions[version] = tuple(adapters)
        try:
            self.use(version, busy)
            self._check_fits(version)
        except BaseException:
            del self._versions[version]
            if version in self._bytes:
                self._unload(version)
            raise

    def _check_fits(self, version: str) -> None:
        held, limit = self._bytes[version], self.limit_bytes
        if limit is not None and held > limit:
            raise ConfigError(f"memory_mb is {limit / MIB:g}, but {version} alone needs {held / MIB:.1f} MB")

    def use(self, version: str, busy: Collection[str] = ()) -> None:
        """Has `version` in memory, and unloads others that are not `busy` where the budget asks for it."""
        if version not in self._bytes:
            loaded = self._load(version)
            with self._lock:
                self._bytes[version] = loaded
                self._loads += 1
        with self._lock:
            self._bytes.move_to_end(version)
        self.trim({version, *busy})

    def trim(self, busy: Collection[str]) -> None:
        """Unloads the longest unused versions, except `busy` ones, until the rest fits into the budget."""
        for version in [version for version, held in self._bytes.items() if held and version not in busy]:
            if self.limit_bytes is None or sum(self._bytes.values()) <= self.limit_bytes:
                return
            self._unload(version)

    def stats(self) -> VersionStats:
        with self._lock:
            held = dict(self._bytes)
        return VersionStats(self._loads, self._unloads, sum(held.values()), self.limit_bytes, held)

    @torch.inference_mode()
    def _load(self, version: str) -> int:
        """Puts a version's weights beside the shared ones, all or none; returns their bytes."""
        lora = read_adapters(self._versions[version], self._base)
        if lora is None:
            return 0
        grouped: dict[Routed, dict[str, Delta]] = {}
        for name, delta in lora.modules.items():
            if name not in self._shared:
                raise CheckpointError(f"adapter {lora.source} names {name}, which versions of one base cannot share")
            grouped.setdefault(self._shared[name], {})[name] = delta
        own: dict[Routed, torch.Tensor | Thin] = {
            routed: routed.fused(parts) if self._adapters == "fused" else routed.thin(parts)
            for routed, parts in grouped.items()
        }
        for routed, weight in own.items():
            routed.own[version] = weight
        return sum(weight.nbytes for weight in own.values())

    def _unload(self, version: str) -> None:
        for routed in self._shared.values():
            routed.own.pop(version, None)
        with self._lock:
            held = self._bytes.pop(version)
            self._unloads += 1
        logger.info("unloaded %s, which held %.1f MB", version, held / MIB)
