"""Rewards beside the trainer: the same scores as alone, and no hang, crash or wrong value goes unnoticed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from tdm_finetune.rewards import RewardPool, load_reward
from tdm_finetune.rewards.pool import PIECE
from tdm_serve.errors import ConfigError, RewardError

HANG_S = 20  # nobody waits for it
SLOW = f"""
import time

def hangs_on(prompt: str):
    def reward(images, prompts, metadata):
        time.sleep({HANG_S} if prompt in prompts else 0)
        return torch.zeros(len(prompts))
    return reward

def sleeps(seconds: float):
    def reward(images, prompts, metadata):
        time.sleep(seconds)
        return torch.tensor([float(text) for text in prompts])
    return reward

def nan_at(prompt: str):
    return lambda images, prompts, metadata: torch.tensor([float("nan") if p == prompt else 1.0 for p in prompts])

def counts():
    return lambda images, prompts, metadata: torch.full((len(prompts),), float(len(prompts)))
"""


def numbered(n: int) -> tuple[torch.Tensor, list[str], list[dict[str, object]]]:
    return torch.zeros(n, 8, 8, 3, dtype=torch.uint8), [str(i) for i in range(n)], [{} for _ in range(n)]


@pytest.fixture
def slow(install: Callable[[str], None]) -> None:
    install(SLOW)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_those_of_the_mixture(scenes_of, workers: int) -> None:
    batch = scenes_of(40)
    text = "scenes:1,scenes-likes:0.5,jpeg:0.1"
    expected = load_reward(text).scores(*batch)
    with RewardPool(text, workers=workers) as pool:
        first, second = pool.submit(*batch), pool.submit_parts(*batch)
        torch.testing.assert_close(first.result(), expected.total, rtol=0, atol=0)
        scores = second.result()
    assert first.result().dtype == torch.float32 and first.result().shape == (40,)
    for label, part in expected.parts.items():
        torch.testing.assert_close(scores.parts[label], part, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "workers", "largest"), [(7, 1, 7), (7, 3, 3), (2, 8, 1), (100, 1, PIECE)])
def test_batches_are_cut_for_the_workers(slow, size: int, workers: int, largest: int) -> None:
    with RewardPool("counts", workers=workers) as pool:
        sizes = pool.submit(*numbered(size)).result()
    assert len(sizes) == size and sizes.max() == largest


def test_submit_returns_at_once_and_workers_run_side_by_side(slow) -> None:
    with RewardPool("sleeps(seconds=0.5)", workers=4) as pool:
        started = time.perf_counter()
        answer = pool.submit(*numbered(4))
        assert not answer.done()
        assert answer.result().tolist() == [0.0, 1.0, 2.0, 3.0]
        assert time.perf_counter() - started < 1.5  # one after the other it would be 2


def test_a_sample_at_fault_is_named_by_its_place_in_the_batch(slow, scenes_of) -> None:
    with RewardPool("nan_at(prompt=5)", workers=4) as pool:
        with pytest.raises(RewardError, match=r"'nan_at' returned nan for sample 5 \('5'\)"):
            pool.submit(*numbered(8)).result()
        assert pool.submit(*numbered(4)).result().tolist() == [1.0] * 4  # the pool goes on
    batch = scenes_of(8)
    batch.metadata[6].pop("spec")
    with (
        RewardPool("scenes", workers=2) as pool,
        pytest.raises(RewardError, match=r"'scenes' cannot judge sample 6 .*no scene under 'spec'"),
    ):
        pool.submit(*batch).result()


def test_a_hang_is_named_and_does_not_block_the_pool(slow) -> None:
    with RewardPool("counts,hangs_on(prompt=2)", workers=2, timeout_s=0.3) as pool:
        started = time.perf_counter()
        with pytest.raises(RewardError) as caught:
            pool.submit(*numbered(4)).result(timeout=5)
        message = str(caught.value)
        assert "'hangs_on' took longer than 0.3 s" in message and "sample 2 ('2')" in message
        assert len(pool.submit(*numbered(2)).result(timeout=5)) == 2
        assert time.perf_counter() - started < HANG_S
    with RewardPool("hangs_on(prompt=0)", timeout_s=0.3) as pool:  # its only thread is the one that hangs
        started = time.perf_counter()
        stuck, behind = pool.submit(*numbered(1)), pool.submit(*numbered(1))
        for answer in (stuck, behind):  # the wait in the queue counts
            with pytest.raises(RewardError, match=r"took longer than 0\.3 s"):
                answer.result(timeout=5)
        assert pool.submit(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["b"], [{}]).result(timeout=5).tolist() == [0.0]
        assert time.perf_counter() - started < HANG_S


def test_closing_answers_everything(slow) -> None:
    pool = RewardPool("sleeps(seconds=0.2)", timeout_s=5)
    running, waiting = pool.submit(*numbered(1)), pool.submit(*numbered(1))
    pool.close()
    for answer in (running, waiting):
        assert answer.done()
    with pytest.raises(RewardError, match="closed before"):
        waiting.result()
    with pytest.raises(RewardError, match="closed"):
        pool.submit(*numbered(1))
    pool.close()


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"timeout_s": 0}, {"timeout_s": float("nan")}])
def test_impossible_pools(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1 and above 0"):
        RewardPool("jpeg", **arguments)
    with pytest.raises(ConfigError, match="unknown"):
        RewardPool("nosuch")


@pytest.mark.slow  # a process that imports torch
def test_a_process_with_a_stuck_reward_still_ends(environment: dict[str, str]) -> None:
    code = """
import time, torch
from tdm_finetune.rewards import pool as module
from tdm_finetune.rewards.base import Part
from tdm_finetune.rewards.registry import Mixture
module.load_reward = lambda text: Mixture((Part("stuck", 1.0, lambda i, p, m: time.sleep(600)),))
pool = module.RewardPool("stuck", timeout_s=0.2)
try:
    pool.submit(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["a"], [{}]).result()
except Exception as error:
    print(error)
pool.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "took longer than 0.2 s" in done.stdout
