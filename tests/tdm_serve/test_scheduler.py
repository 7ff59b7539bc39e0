"""Which requests share a batch; pure, so no engine is needed."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tdm_serve.scheduler import next_batch


@dataclass(frozen=True)
class Job:
    key: int


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 8))
def test_the_oldest_runs_with_its_like_in_order(keys: list[int], max_batch: int) -> None:
    chosen = next_batch([Job(key) for key in keys], max_batch)
    alike = [index for index, key in enumerate(keys) if key == keys[0]]
    assert chosen == alike[:max_batch]


def test_an_empty_queue_gives_no_batch() -> None:
    assert next_batch([], 4) == []
