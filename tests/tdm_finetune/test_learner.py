"""A role's optimiser: micro-batches, clipping, freezing; and the guard that names the term that exploded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_trainee import SHAPE, bits, close, prompts, same, student, tdm_config

from tdm_finetune.learner import EarlyStop, Guard, Learner
from tdm_finetune.student import Batch, Student
from tdm_serve.errors import TrainingDiverged


def made(rate: float = 0.1, **values: Any) -> tuple[Student, Learner]:
    found = student(tdm_config(Path("unused"), **values))
    return found, Learner("toy", found.generator, rate, 0.0, found)


def phase(found: Student, learner: Learner, factor: float = 1.0, size: float = 1.0) -> dict[str, float]:
    """One step towards zero output; "seen" has no gradient and is only logged."""
    batch = found.batch(prompts(6), 1, 0, range(6))
    noise = batch.draws.normal(*SHAPE)

    def terms(chosen: slice, part: Batch) -> Mapping[str, Tensor]:
        output = found.generator(noise[chosen], found.top.expand(len(part)), part.conditioning)
        return {"loss": size * output.square().mean((1, 2, 3)), "seen": output.detach().abs().mean((1, 2, 3))}

    return learner.phase(batch, factor, terms)


def test_terms_are_logged_under_the_roles_name() -> None:
    scalars = phase(*made())
    assert list(scalars) == ["toy_loss", "toy_seen", "toy_gradient_norm"]
    assert all(value > 0 for value in scalars.values())


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_parts_add_up_to_the_whole(micro_batch: int) -> None:
    """Also parts of unequal size, which count by their pictures."""
    (one, first), (two, second) = made(), made(micro_batch=micro_batch)
    for _ in range(3):
        expected, found = phase(one, first), phase(two, second)
        assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    assert close(one.generator.parameters, two.generator.parameters)


def test_a_step_is_clipped_and_its_norm_is_told_before() -> None:
    gentle, hard = made(clip=1e9), made(clip=1e-3)
    norms = [phase(*one)["toy_gradient_norm"] for one in (gentle, hard)]
    assert norms[0] == norms[1] > 1e-3
    moment = hard[1].optimizer.state[hard[0].generator.parameters[1]]["exp_avg"]
    total = sum(float(s["exp_avg"].square().sum()) for s in hard[1].optimizer.state.values())
    assert math.sqrt(total) == pytest.approx(1e-3, rel=1e-3) and moment.any()


def test_gradients_do_not_outlive_a_step() -> None:
    found, learner = made()
    phase(found, learner)
    assert all(p.grad is None for p in found.generator.parameters)


def test_a_rate_is_its_share_of_the_schedule() -> None:
    found, learner = made(rate=0.2)
    phase(found, learner, factor=0.25)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    before = bits(found.generator.parameters)
    phase(found, learner, factor=0.0)
    assert same(found.generator.parameters, before)


def test_a_frozen_role_is_not_even_run() -> None:
    found, learner = made(rate=0.0, weight_decay=0.5)
    before = bits(found.generator.parameters)

    def refuse(_chosen: slice, _part: Batch) -> Mapping[str, Tensor]:
        raise AssertionError("a frozen role has no terms")

    assert not learner.trains
    assert learner.phase(found.batch(prompts(2), 1, 0, range(2)), 1.0, refuse) == {}
    assert same(found.generator.parameters, before)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e38])
def test_a_gradient_that_is_not_finite_moves_nothing(size: float) -> None:
    """The guard reports it, and the weights are still those of the update before."""
    found, learner = made()
    phase(found, learner)
    before = bits(found.generator.parameters)
    scalars = phase(found, learner, size=size)
    assert not math.isfinite(scalars["toy_gradient_norm"])
    assert same(found.generator.parameters, before)
    assert math.isfinite(phase(found, learner)["toy_gradient_norm"])  # nothing of it is left


def test_an_optimisers_state_goes_through_a_file(tmp_path: Path) -> None:
    (one, first), (two, second) = made(), made()
    phase(one, first)
    torch.save({"learner": first.state(), "role": one.generator.parameters}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load(state["learner"])
    for tensor, value in zip(two.generator.parameters, state["role"], strict=True):
        tensor.data.copy_(value)
    assert phase(one, first) == phase(two, second)
    assert same(one.generator.parameters, two.generator.parameters)


def run(guard: Guard, values: list[float], name: str = "kl") -> None:
    for step, value in enumerate(values):
        guard.check({"calm": 1.0, name: value}, step, "runs/x/state.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named_at_once(value: float) -> None:
    with pytest.raises(
        TrainingDiverged, match=rf"^kl is {value} at update 1; the last good state is runs/x/state\.pt$"
    ):
        run(Guard(), [value])


def test_an_explosion_is_named() -> None:
    usual = [0.5] * 25
    with pytest.raises(TrainingDiverged, match=r"^kl exploded: 60 at update 28, usually 0\.5; .* runs/x/state\.pt$"):
        run(Guard(), [*usual, 60.0, 60.0, 60.0])
    with pytest.raises(TrainingDiverged, match=r"kl exploded: -?70"):
        run(Guard(), [*(-value for value in usual), -70.0, 70.0, -70.0])


@pytest.mark.parametrize(
    "values",
    [
        [*[0.5] * 25, *[60.0, 60.0, 0.5] * 5],  # single spikes come and go
        [*[0.5] * 10, *[60.0] * 10],  # what is usual is not known yet
        [1.1**i for i in range(100)],  # growth is not an explosion
        [*[0.5] * 25, *[40.0] * 10],
        [*[0.0] * 40, *[0.25] * 20],  # shares may leave zero, as that of constant groups does
        [*[1e-12] * 40, *[1e-3] * 20],
    ],
)
def test_what_happens_in_good_runs_is_left_alone(values: list[float]) -> None:
    run(Guard(), values, "constant_groups")


def test_a_slow_machine_is_no_divergence() -> None:
    run(Guard(), [*[0.1] * 25, *[60.0] * 5], "seconds_reward")


def test_an_early_stop_keeps_the_best() -> None:
    early = EarlyStop(2)
    for score in (0.5, 0.7, 0.6, 0.8, 0.8):
        early.see(score, {"0": torch.tensor(score)})
        assert not early.over
    early.see(0.7, {"0": torch.tensor(0.7)})
    assert early.over and early.kept is not None and float(early.kept["0"]) == pytest.approx(0.8)
    resumed = EarlyStop(2)
    resumed.load(early.state())
    assert resumed.over


def test_without_patience_nothing_stops_or_is_kept() -> None:
    early = EarlyStop(0)
    for _ in range(5):
        early.see(0.0, {"0": torch.zeros(1)})
    assert not early.over and early.kept is None
