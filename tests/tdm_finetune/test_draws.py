"""Random numbers by (seed, update, group): the same however groups are split, and unrelated otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tdm_finetune.draws import Draws, stream

CPU = torch.device("cpu")
SIZE = 3

Draw = Callable[[Draws], Tensor]
DRAWN: dict[str, Draw] = {
    "normal": lambda draws: draws.normal(2, 4),
    "shared_normal": lambda draws: draws.shared_normal(2, 4),
    "uniform": lambda draws: draws.uniform(),
    "shared_uniform": lambda draws: draws.shared_uniform(),
    "below": lambda draws: draws.below(1000),
    "shared_choice": lambda draws: draws.shared_choice(torch.ones(1000)),
}
each_draw = pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)


def of(seed: int = 0, update: int = 3, groups: tuple[int, ...] = (0, 1, 2, 3), size: int = SIZE) -> Draws:
    return Draws.of(seed, update, groups, size, CPU)


@each_draw
def test_the_same_key_draws_the_same(draw: Draw) -> None:
    assert torch.equal(draw(of()), draw(of()))
    assert len(draw(of())) == 4 * SIZE


@each_draw
def test_a_draw_does_not_depend_on_how_groups_are_split(draw: Draw) -> None:
    """Over micro-batches, over processes, or in whatever company."""
    whole = draw(of())
    parts = of()
    assert torch.equal(whole, torch.cat([draw(parts.part(slice(0, 1))), draw(parts.part(slice(1, 4)))]))
    assert torch.equal(whole, torch.cat([draw(of(groups=(0, 1))), draw(of(groups=(2, 3)))]))
    assert torch.equal(whole[6:9], draw(of(groups=(2,))))
    assert torch.equal(whole[6:9], draw(of(groups=(7, 2)))[3:])


@each_draw
def test_streams_go_on_through_their_parts(draw: Draw) -> None:
    """A second draw is not a repetition, and is the same whether the first one was taken whole or in parts."""
    whole, parted = of(), of()
    first = draw(whole)
    for group in range(4):
        draw(parted.part(slice(group, group + 1)))
    second = draw(parted)
    assert torch.equal(draw(whole), second)
    assert not torch.equal(first, second)


@each_draw
def test_another_seed_update_or_group_draws_otherwise(draw: Draw) -> None:
    plain = draw(of())
    for other in (of(seed=1), of(update=4), of(groups=(4, 5, 6, 7))):
        assert not torch.equal(plain, draw(other))
    rows = plain.view(4, SIZE, -1)
    assert not any(torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", ["shared_normal", "shared_uniform", "shared_choice"])
def test_shared_draws_are_equal_inside_a_group(name: str) -> None:
    drawn = DRAWN[name](of()).view(4, SIZE, -1)
    assert torch.equal(drawn, drawn[:, :1].expand_as(drawn))


@pytest.mark.parametrize("name", ["normal", "uniform", "below"])
def test_other_draws_differ_inside_a_group(name: str) -> None:
    drawn = DRAWN[name](of()).view(4, SIZE, -1)
    assert not any(torch.equal(group[0], group[1]) for group in drawn)


def test_draws_have_the_distribution_that_they_name() -> None:
    many = of(groups=tuple(range(2000)), size=2)
    normal, uniform = many.normal(4), many.uniform()
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.03
    assert set(many.below(4).tolist()) == {0, 1, 2, 3}
    chosen = many.shared_choice(torch.tensor([0.0, 1.0, 3.0])).view(-1, 2)[:, 0]
    assert not (chosen == 0).any()
    assert float((chosen == 2).float().mean()) == pytest.approx(0.75, abs=0.05)


def test_keys_of_another_length_are_other_keys() -> None:
    """The first weights of a role must not be the first noise of an update."""
    drawn = [torch.randn(4, generator=stream(*key)) for key in ((0, 1), (0, 1, 0), (0, 1, 0, 0), (0,), (1,))]
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(len(drawn)) for j in range(i))


def test_seeds_may_be_large() -> None:
    assert not torch.equal(torch.randn(4, generator=stream(2**63)), torch.randn(4, generator=stream(2**31)))
    with pytest.raises(ValueError, match="non-negative"):
        stream(-1)
