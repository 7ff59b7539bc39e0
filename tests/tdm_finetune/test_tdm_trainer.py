"""TDM's trainer on the toy: it trains what it should, whatever the options, and micro-batches change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zimage import TinyZImage
from toy_trainee import (
    ToyTrainee,
    bits,
    close,
    diffusion,
    distillation,
    finite,
    prompts,
    same,
    step,
    student,
    tdm_config,
)

from tdm_finetune.process import Process
from tdm_finetune.tdm import Distillation
from tdm_serve.errors import ConfigError
from tdm_serve.models.lora import read_lora

UNUSED = Path("unused")


def trained(
    count: int = 2, process: Process | None = None, **values: Any
) -> tuple[Distillation, list[dict[str, float]]]:
    trainer = distillation(tdm_config(UNUSED, **values), ToyTrainee(process))
    return trainer, step(trainer, count)


@pytest.mark.parametrize("rank", [2, 0])
def test_distillation_moves_its_roles_and_leaves_the_base_alone(rank: int) -> None:
    trainee = ToyTrainee()
    before = bits(list(trainee.net.parameters()))
    trainer = distillation(tdm_config(UNUSED, rank=rank), trainee)
    found = trainer.student
    roles = [bits(role.parameters) for role in (found.generator, found.fake)]
    step(trainer, 2)
    assert same(list(trainee.net.parameters()), before)
    assert all(parameter.grad is None for parameter in trainee.net.parameters())
    for role, kept in zip((found.generator, found.fake), roles, strict=True):
        assert not any(map(torch.equal, role.parameters, kept))


def test_distilling_z_image_reaches_every_module() -> None:
    """Its text refiner and its attention, which the dense denoiser holds under other names."""
    trainee = TinyZImage()
    trainer = Distillation(tdm_config(UNUSED, batch=2), student(tdm_config(UNUSED, batch=2), trainee))
    scalars = step(trainer, 2)
    assert all(map(finite, scalars))
    assert all(
        bool(b.any()) for role in (trainer.student.generator, trainer.student.fake) for b in role.parameters[1::2]
    )
    assert all(parameter.grad is None for parameter in trainee.transformer.parameters())


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 99])
@pytest.mark.parametrize("rank", [2, 0])
def test_micro_batches_change_nothing(micro_batch: int, rank: int) -> None:
    """Gradients add up to the whole batch's, also where the parts are of unequal size."""
    whole, expected = trained(3, rank=rank, fake_anchor=0.1)
    parted, scalars = trained(3, rank=rank, fake_anchor=0.1, micro_batch=micro_batch)
    for one, other in zip(expected, scalars, strict=True):
        for name in one.keys() - {key for key in one if key.startswith("seconds_")}:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    for name in ("generator", "fake"):
        roles = [getattr(t.student, name).parameters for t in (whole, parted)]
        assert close(*roles)


OPTIONS: list[dict[str, Any]] = [
    *({"nfe": nfe} for nfe in (1, 2, 3, 5, 6, 7, 8)),
    *({"nfe": nfe, "interval": "separate"} for nfe in (1, 8)),
    {"interval": "separate", "target": "bridge", "metric": "huber"},
    {"target": "bridge"},
    {"importance": True},
    {"importance": True, "metric": "huber", "fake_anchor": 0.02},
    {"guidance": 1.0},
    {"guidance": 0.0},
    {"fake_updates": 3},
    {"weight_decay": 0.01, "ema": 0.0},
    {"precision": "bf16"},
    {"rank": 0, "precision": "bf16", "checkpointing": True},
]


@pytest.mark.parametrize("values", OPTIONS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()))
@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_all_options_train(kind: str, values: dict[str, Any]) -> None:
    trainer, scalars = trained(2, None if kind == "flow" else diffusion(kind), **values)
    assert all(map(finite, scalars))
    assert {"fake_loss", "fake_gradient_norm", "generator_kl", "generator_guidance", "generator_gradient_norm"} <= set(
        scalars[-1]
    )
    assert scalars[-1]["generator_gradient_norm"] > 0
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.student.generator.parameters)


@pytest.mark.parametrize("role", ["generator", "fake"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_rate_of_zero_freezes_a_role_exactly(role: str, weight_decay: float) -> None:
    trainer = distillation(tdm_config(UNUSED, weight_decay=weight_decay, **{f"{role}_rate": 0.0}))
    found = trainer.student
    roles = {"generator": found.generator, "fake": found.fake}
    kept = {name: bits(role.parameters) for name, role in roles.items()}
    scalars = step(trainer, 3)
    assert {name: same(roles[name].parameters, kept[name]) for name in roles} == {
        "generator": role == "generator",
        "fake": role == "fake",
    }
    assert not any(name.startswith(role) for row in scalars for name in row)
    if role == "generator":
        assert same(list(found.average.state_dict().values()), kept["generator"])


def test_the_fake_score_may_take_several_steps() -> None:
    once, often = (trained(1, fake_updates=n, clip=1e-3)[0] for n in (1, 4))
    state = [t.fake.state()["state"][0]["step"] for t in (once, often)]
    assert [float(s) for s in state] == [1.0, 4.0]
    assert not same(once.student.fake.parameters, often.student.fake.parameters)


def test_rates_warm_up_stay_and_fall() -> None:
    trainer = distillation(tdm_config(UNUSED, steps=10, warmup=4, decay_steps=3, fake_rate=1.0, generator_rate=0.5))
    rates: list[list[float]] = []
    for index in range(10):
        step(trainer, 1, first=index)
        rates.append([learner.optimizer.param_groups[0]["lr"] for learner in (trainer.fake, trainer.generator)])
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]
    assert rates == [[pytest.approx(rate), pytest.approx(rate / 2)] for rate in expected]


def test_an_update_depends_on_its_number_and_seed_only() -> None:
    """Not on what the global generator is at, so nothing of it need be saved."""
    config = tdm_config(UNUSED)
    one, two = distillation(config), distillation(config)
    torch.manual_seed(99)
    torch.rand(7)
    first = one.update(prompts(8), range(8), 3)
    torch.rand(5)
    again = two.update(prompts(8), range(8), 3)
    assert first["fake_loss"] == again["fake_loss"] and same(one.student.fake.parameters, two.student.fake.parameters)
    other = distillation(tdm_config(UNUSED, seed=1)).update(prompts(8), range(8), 3)
    assert other["fake_loss"] != first["fake_loss"]


def test_only_a_base_is_distilled(tmp_path: Path) -> None:
    """An adapter is trained against the base's weights, so starting from another one would spoil it."""
    trainee = ToyTrainee()
    student(tdm_config(tmp_path), ToyTrainee()).generator.save(tmp_path)
    trainee.adapter = read_lora(tmp_path / "adapter.safetensors")
    with pytest.raises(ConfigError, match="checkpoint 'toy' is an adapter on a base"):
        distillation(tdm_config(tmp_path), trainee)
