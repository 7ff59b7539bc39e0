"""TDM-R1's trainer on the toy: options, masks, what stays frozen, and that the reward rises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_trainee import ToyTrainee, bits, close, diffusion, finite, prompts, r1_config, reinforcement, same, step

from tdm_finetune.draws import Draws
from tdm_finetune.process import Process
from tdm_finetune.roles import Role
from tdm_finetune.student import Batch
from tdm_finetune.tdm_r1 import Reinforcement
from tdm_serve.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("toy_rewards", "closed_trainers")
UNUSED = Path("unused")
Scalars = list[dict[str, float]]


def made(process: Process | None = None, **values: Any) -> Reinforcement:
    return reinforcement(r1_config(UNUSED, **values), ToyTrainee(process))


def roles_of(trainer: Reinforcement) -> dict[str, Role]:
    return {
        "generator": trainer.student.generator,
        "fake": trainer.student.fake,
        "surrogate": trainer.surrogate.role,
    }


def batch_of(trainer: Reinforcement, groups: int = 8, update: int = 50) -> Batch:
    return trainer.student.batch(prompts(groups, 9), trainer.config.group, update, range(groups))


TERMS = {
    "fake": {"loss", "gradient_norm"},
    "surrogate": {"preference", "anchor", "drift", "group_weight", "old_clipped", "drift_clipped", "gradient_norm"},
    "generator": {"kl", "guidance", "reward", "gradient_norm"},
}
OPTIONS: list[dict[str, Any]] = [
    *({"nfe": nfe} for nfe in (1, 2, 3, 5, 6, 7, 8)),
    {"nfe": 8, "interval": "separate", "target": "bridge", "metric": "huber"},
    {"eta": 0.5, "importance": True},
    {"eta": 1.0, "reference": "ema"},
    {"reference": "ema", "reference_decay": 0.5, "metric": "huber"},
    {"advantage": "binary", "advantage_scale": "prompt"},
    {"kl_weight": 0.0},
    {"tdm_weight": 0.0, "surrogate_guidance": 1.0},
    {"tdm_weight": 1.0, "guidance": 1.0},
    {"trunc_steps": 2, "fake_updates": 0},
    {"reward_steps": "last", "surrogate_anchor": 0.0, "beta": 100.0},
    {"old_clip": 0.0, "drift_clip": 0.0},
    {"surrogate_time_min": 0.9, "generator_time_min": 0.9},
    {"surrogate_time_min": 0.0, "generator_time_min": 0.0},
    {"precision": "bf16", "reference": "ema"},
    {"rank": 0, "reference": "ema"},
]


def described(values: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


@pytest.mark.parametrize("values", OPTIONS, ids=described)
@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_all_options_train(kind: str, values: dict[str, Any]) -> None:
    trainer = made(None if kind == "flow" else diffusion(kind), **values)
    before = {name: bits(role.parameters) for name, role in roles_of(trainer).items()}
    scalars = step(trainer, 2)
    assert all(map(finite, scalars))
    trained = {name for name in TERMS if name != "fake" or trainer.config.fake_updates}
    for name, role in roles_of(trainer).items():
        assert same(role.parameters, before[name]) == (name not in trained), name
        assert all(bool(tensor.isfinite().all()) for tensor in role.parameters)
    expected = {f"{name}_{term}" for name in trained for term in TERMS[name]} | {"reward", "constant_groups"}
    assert {name for name in scalars[-1] if not name.startswith("seconds_")} == expected


@pytest.mark.parametrize("micro_batch", [4, 8, 12])
@pytest.mark.parametrize(
    "values", [{}, {"reference": "ema", "eta": 0.5, "advantage": "binary"}, {"rank": 0}], ids=described
)
def test_micro_batches_change_nothing(micro_batch: int, values: dict[str, Any]) -> None:
    whole, parted = made(**values), made(**values, micro_batch=micro_batch)
    for one, other in zip(step(whole, 3), step(parted, 3), strict=True):
        for name in one.keys() - {key for key in one if key.startswith("seconds_")}:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    for name, role in roles_of(whole).items():
        assert close(role.parameters, roles_of(parted)[name].parameters), name


@pytest.mark.parametrize("frozen", ["generator", "fake", "surrogate"])
def test_a_rate_of_zero_freezes_a_role_exactly(frozen: str) -> None:
    rate: dict[str, Any] = {f"{frozen}_rate": 0.0}
    trainer = made(weight_decay=0.1, **rate)
    before = {name: bits(role.parameters) for name, role in roles_of(trainer).items()}
    scalars = step(trainer, 3)
    for name, role in roles_of(trainer).items():
        assert same(role.parameters, before[name]) == (name == frozen), name
    assert not any(name.startswith(f"{frozen}_") for row in scalars for name in row)
    if frozen == "surrogate":
        assert same(list(trainer.surrogate.old.state_dict().values()), before["surrogate"])


def test_at_first_only_the_fake_score_trains() -> None:
    trainer = made(fake_warmup=2)
    before = {name: bits(role.parameters) for name, role in roles_of(trainer).items()}
    scalars = step(trainer, 2)
    assert {name for name, role in roles_of(trainer).items() if not same(role.parameters, before[name])} == {"fake"}
    assert not any(name.startswith(("generator", "surrogate_")) for row in scalars for name in row)
    assert "reward" in scalars[0]
    assert "generator_kl" in step(trainer, 1, first=2)[0]


def test_a_run_that_goes_on_from_another_has_a_trained_fake_score(tmp_path: Path) -> None:
    earlier = made()
    step(earlier, 2)
    torch.save(earlier.state(), tmp_path / "state.pt")
    later = made(start=tmp_path, fake_warmup=20)
    assert same(later.student.fake.parameters, earlier.student.fake.parameters)
    assert "generator_kl" in step(later, 1)[0]


def generator_terms(trainer: Reinforcement) -> tuple[Tensor, dict[str, Tensor]]:
    """Which boundary each picture has, and its weighted terms, for the same draws each time."""
    batch = batch_of(trainer)
    terms = trainer.generator_terms(batch, trainer.student.roll_out(batch, trainer.config.eta))
    draws = Draws.of(trainer.config.seed, 50, range(8), trainer.config.group, torch.device("cpu"))
    draws.normal(*trainer.student.trainee.latent_shape)  # of the rollout
    return draws.below(trainer.config.nfe), {name: term.detach() for name, term in terms.items()}


def test_behind_trunc_steps_the_generator_follows_tdm_alone() -> None:
    free, cut = made(trunc_steps=4), made(trunc_steps=2)
    step(free, 2)
    cut.load(free.state())
    (k, whole), (_, masked) = generator_terms(free), generator_terms(cut)
    early, late = k < 2, k >= 2
    assert early.any() and late.any() and (whole["reward"] > 0).all()
    for name, factor in (("kl", 0.3), ("guidance", 1.0), ("reward", 0.0)):
        torch.testing.assert_close(masked[name][early], whole[name][early])
        torch.testing.assert_close(masked[name][late], factor * whole[name][late])


def test_the_last_step_alone_may_carry_the_reward() -> None:
    trainer = made(reward_steps="last", nfe=4, trunc_steps=4)
    step(trainer, 2)
    k, terms = generator_terms(trainer)
    assert torch.equal(terms["reward"] > 0, k == 3)
    draws = Draws.of(0, 0, range(200), 2, torch.device("cpu"))
    assert set(draws.shared_choice(trainer.surrogate.chances).tolist()) == {3}
    assert set(draws.shared_choice(made(nfe=4).surrogate.chances).tolist()) == {0, 1, 2, 3}


def test_weights_of_the_terms() -> None:
    plain = made(tdm_weight=0.5, kl_weight=1.0)
    step(plain, 2)
    state = plain.state()
    found: dict[tuple[float, float], dict[str, Tensor]] = {}
    for tdm, kl in ((0.5, 1.0), (0.25, 1.0), (0.5, 0.0)):
        trainer = made(tdm_weight=tdm, kl_weight=kl)
        trainer.load(state)
        found[tdm, kl] = generator_terms(trainer)[1]
    one, less, without = found.values()
    torch.testing.assert_close(less["guidance"], one["guidance"] / 2)
    torch.testing.assert_close(less["reward"], one["reward"] * 1.5)
    torch.testing.assert_close(less["kl"], one["kl"])
    assert not without["kl"].any() and torch.equal(without["reward"], one["reward"])


def test_without_kl_the_generator_gets_no_pull_from_it() -> None:
    """Neither where TDM alone is followed: at weight 0 for the rest, nothing moves the generator."""
    trainer = made(kl_weight=0.0, guidance=1.0, surrogate_rate=0.0, surrogate_guidance=1.0)
    before = bits(trainer.student.generator.parameters)
    scalars = step(trainer, 2)
    assert all(row["generator_gradient_norm"] < 1e-6 for row in scalars)
    assert close(trainer.student.generator.parameters, before, 1e-2)


def test_the_reference_may_be_a_slow_average() -> None:
    trainer = made(reference="ema", reference_decay=0.9)
    frozen = made()
    assert trainer.surrogate.slow is not None and frozen.surrogate.slow is None
    step(trainer, 3)
    slow = list(trainer.surrogate.slow.state_dict().values())
    assert not same(slow, trainer.surrogate.role.parameters)
    state = trainer.state()
    again = made(reference="ema", reference_decay=0.9)
    again.load(state)
    assert again.surrogate.slow is not None and same(list(again.surrogate.slow.state_dict().values()), slow)
    assert same(again.surrogate.role.parameters, trainer.surrogate.role.parameters)
    assert same(list(again.surrogate.old.state_dict().values()), list(trainer.surrogate.old.state_dict().values()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_clip_compares_with_the_average_and_not_with_itself(precision: str) -> None:
    """Autocast's cache of converted weights would hand the average's to the live role."""
    trainer = made(precision=precision, old_clip=0.0, drift_clip=1e9)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trainer.surrogate.role.parameters:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=random))
    batch = batch_of(trainer)
    trajectory = trainer.student.roll_out(batch)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(8)
    with trainer.student.autocast():
        terms = trainer.surrogate.terms(batch, trajectory, advantage)
    clipped = terms["old_clipped"] + terms["drift_clipped"] > 0
    assert clipped.any() and not clipped.all()
    held, moving = (terms["preference"][which].sum() for which in (clipped, ~clipped))
    parameters = trainer.surrogate.role.parameters
    assert not any(g.any() for g in torch.autograd.grad(held, parameters, retain_graph=True))
    assert all(g.any() for g in torch.autograd.grad(moving, parameters))


def test_direct_preference_trains_the_generator_alone() -> None:
    trainer = made(preference="generator", surrogate_rate=1e-3)
    assert trainer.surrogate.role is trainer.student.generator
    fake, before = bits(trainer.student.fake.parameters), bits(trainer.student.generator.parameters)
    scalars = step(trainer, 2)
    assert same(trainer.student.fake.parameters, fake) and not same(trainer.student.generator.parameters, before)
    assert not any(name.startswith(("fake", "generator")) for row in scalars for name in row)
    assert set(trainer.surrogate.chances.nonzero().flatten().tolist()) == {3}  # at clean pictures only
    again = made(preference="generator", surrogate_rate=1e-3)
    again.load(trainer.state())
    assert same(again.student.generator.parameters, trainer.student.generator.parameters)


def test_a_surrogate_of_another_run(tmp_path: Path) -> None:
    earlier = made()
    step(earlier, 2)
    torch.save(earlier.state(), tmp_path / "state.pt")
    later = made(surrogate=tmp_path, surrogate_rate=0.0)
    assert same(later.surrogate.role.parameters, earlier.surrogate.role.parameters)
    step(later, 2)
    assert same(later.surrogate.role.parameters, earlier.surrogate.role.parameters)  # frozen, as the ablation is
    assert same(list(later.surrogate.old.state_dict().values()), earlier.surrogate.role.parameters)
    with pytest.raises(CheckpointError, match=r"state\.pt is missing; `tdm-serve finetune tdm-r1`"):
        made(surrogate=tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_the_reward_rises(rank: int) -> None:
    """The toy's distance from the brightness that is asked for is halved; its errors are larger than SD3's."""
    trainer = made(
        rank=rank, steps=150, groups=8, group=8, warmup=5, decay_steps=10, guidance=1.0, generator_rate=5e-3,
        fake_rate=2e-2, surrogate_rate=5e-3, old_clip=0.05, drift_clip=1.0,
    )  # fmt: skip
    rewards = [row["reward"] for row in step(trainer, 150)]
    assert sum(rewards[-15:]) > 0.7 * sum(rewards[:15])  # minus the distance
