"""Kept tensors: least recently used first out, bytes within the limit, counters that any thread may read."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_serve.errors import ConfigError
from tdm_serve.prompt_cache import MIB, PromptCache


def tensor(kib: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((kib * 256,), value)  # float32


def test_the_longest_unused_goes_first() -> None:
    cache = PromptCache(3 / 1024)  # 3 KiB
    for name in "abc":
        cache.put(name, tensor(1))
    assert cache.get("a") is not None
    cache.put("d", tensor(1))
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    assert cache.get("b") is None
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.entries, stats.bytes) == (1, 1, 1, 3, 3072)


def test_looking_is_no_use_and_is_not_counted() -> None:
    cache = PromptCache(2 / 1024)
    cache.put("a", tensor(1))
    cache.put("b", tensor(1))
    assert "a" in cache and "c" not in cache
    assert cache.get("b", counted=False) is not None
    cache.put("c", tensor(1))
    assert "a" not in cache
    assert (cache.hits, cache.misses, cache.evictions) == (0, 0, 1)


def test_nothing_is_kept_at_zero_nor_what_is_too_large() -> None:
    for cache in (PromptCache(0), PromptCache(1 / 1024)):
        cache.put("a", tensor(2))
        assert "a" not in cache and cache.bytes == 0


def test_a_new_value_replaces_the_old_one() -> None:
    cache = PromptCache(1)
    cache.put("a", tensor(4))
    cache.put("a", tensor(1, 5.0))
    found = cache.get("a")
    assert found is not None and found[0] == 5.0 and cache.bytes == 1024
    cache.clear()
    assert cache.bytes == 0 and cache.hits == 1


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
def test_sizes_that_are_none(size: float) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        PromptCache(size)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), max_size=60))
def test_the_bytes_are_what_is_kept(puts: list[tuple[int, int]]) -> None:
    cache = PromptCache(6 / 1024)
    sizes: dict[int, int] = {}
    for key, kib in puts:
        cache.put(key, tensor(kib))
        sizes[key] = kib * 1024
        assert key in cache
        assert cache.bytes == sum(size for name, size in sizes.items() if name in cache) <= cache.limit_bytes


def test_counters_are_read_while_another_thread_stores() -> None:
    cache = PromptCache(16 / 1024)
    stop = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(cache.stats().bytes)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for index in range(2000):
        cache.put(index % 40, tensor(1))
        cache.get(index % 7)
    stop.set()
    for thread in threads:
        thread.join()
    assert max(seen) <= cache.limit_bytes < MIB
    assert cache.hits + cache.misses == 2000
