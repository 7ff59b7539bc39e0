"""One process among its peers: shares, averages, mixed precision. Several real processes are in test_processes.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from toy_trainee import ToyTrainee, bits, same

from tdm_finetune.ema import Ema
from tdm_finetune.workers import Precision, Workers, autocast
from tdm_serve.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Workers:
    return Workers()


def test_alone_everything_is_its_own(alone: Workers) -> None:
    assert (alone.rank, alone.count, alone.leads) == (0, 1, True)
    assert alone.share(7) == range(7)
    values = torch.tensor([1.0, 2.0, 4.0])
    assert torch.equal(alone.mean(values), values)
    assert float(alone.std(values)) == pytest.approx(float(values.std(correction=0)))
    kept = values.clone()
    alone.mean_([values])
    alone.mean_([])
    assert torch.equal(values, kept)
    assert alone.means({"loss": 0.1}) == {"loss": 0.1}


def test_sharding_alone_changes_nothing(alone: Workers) -> None:
    trainee = ToyTrainee()
    before = bits(list(trainee.net.parameters()))
    alone.shard(trainee.net, trainee.blocks())
    assert same(list(trainee.net.parameters()), before)


def test_groups_are_never_split(alone: Workers) -> None:
    alone.count = 3
    shares: list[range] = []
    for alone.rank in range(3):
        assert alone.leads == (alone.rank == 0)
        shares.append(alone.share(6))
    assert shares == [range(2), range(2, 4), range(4, 6)]
    with pytest.raises(ConfigError, match="7 prompts an update do not divide among 3 processes; use a multiple"):
        alone.share(7)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precisions(precision: Precision, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), autocast(CPU, precision):
        product = torch.ones(2, 2) @ weight
    assert product.dtype == dtype
    assert (torch.ones(2, 2) @ weight).dtype == torch.float32


def test_averages_put_in_place_inside_a_phase_are_seen() -> None:
    """Autocast would go on with the weights that it has converted before."""
    weight = torch.full((2, 2), 3.0, requires_grad=True)
    average = Ema({"weight": weight}, 0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    product: Callable[[], float] = lambda: float((torch.eye(2) @ weight)[0, 0].detach())  # noqa: E731
    with autocast(CPU, "bf16"):
        with torch.no_grad(), average.applied():
            assert product() == 3.0
        assert product() == 1.0
        with torch.no_grad(), average.applied():
            assert product() == 3.0
