"""What TDM and TDM-R1 share: batches, rollouts on serving's rows, the levels and terms, and who gets gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from toy_trainee import (
    SHAPE,
    ToyTrainee,
    bits,
    diffusion,
    distillation,
    prompts,
    r1_config,
    reinforcement,
    same,
    step,
    student,
    tdm_config,
)

from tdm_finetune.process import noise_of
from tdm_finetune.student import Batch, Student
from tdm_finetune.tdm import TdmConfig
from tdm_finetune.tdm_r1 import TdmR1Config
from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.lora import read_lora

each_process = pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])


def made(kind: str = "flow", *, moved: bool = True, **values: Any) -> Student:
    """A student whose roles are no longer the base."""
    config = tdm_config(Path("unused"), **values)
    found = student(config, ToyTrainee(None if kind == "flow" else diffusion(kind)))
    if moved:
        for index, role in enumerate((found.generator, found.fake)):
            random = torch.Generator().manual_seed(index)
            with torch.no_grad():
                for tensor in role.parameters:
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=random))
    return found


def batch_of(found: Student, count: int = 4, group: int = 3, update: int = 1) -> Batch:
    return found.batch(prompts(count), group, update, range(count))


def test_a_batch_holds_whole_groups() -> None:
    found = made()
    chosen = prompts(3)
    batch = found.batch(chosen, 2, 5, range(3))
    assert [p.text for p in batch.prompts] == [p.text for p in chosen for _ in range(2)]
    assert len(batch) == len(batch.conditioning[0]) == len(batch.empty[1]) == 6
    assert torch.equal(batch.conditioning[0][::2], found.trainee.encode([p.text for p in chosen])[0])
    assert torch.equal(batch.empty[0], found.trainee.encode([""])[0].expand(6, 3))


@pytest.mark.parametrize(
    ("pictures", "sizes"), [(0, [12]), (3, [3, 3, 3, 3]), (6, [6, 6]), (9, [9, 3]), (2, [3, 3, 3, 3]), (99, [12])]
)
def test_parts_are_whole_groups_with_their_own_random_numbers(pictures: int, sizes: list[int]) -> None:
    found = made()
    noise = batch_of(found).draws.normal(*SHAPE)
    parts = list((batch := batch_of(found)).parts(pictures))
    assert [len(part) for _, part in parts] == sizes
    assert [p for _, part in parts for p in part.prompts] == batch.prompts
    for joined, parted in ((c, [part.conditioning[i] for _, part in parts]) for i, c in enumerate(batch.conditioning)):
        assert torch.equal(joined, torch.cat(parted))
    assert torch.equal(noise, torch.cat([part.draws.normal(*SHAPE) for _, part in parts]))
    assert all(torch.equal(batch.conditioning[0][chosen], part.conditioning[0]) for chosen, part in parts)
    half = found.batch(prompts(4)[2:], 3, 1, range(2, 4))  # of another process
    assert torch.equal(half.draws.normal(*SHAPE), noise[6:])


@each_process
@pytest.mark.parametrize("nfe", [1, 3, 8])
def test_a_rollout_runs_the_rows_that_serving_runs(kind: str, nfe: int) -> None:
    found = made(kind, nfe=nfe)
    batch = batch_of(found)
    trajectory = found.roll_out(batch)
    assert trajectory.states.shape == (nfe + 1, 12, *SHAPE) and trajectory.clean.shape == (nfe, 12, *SHAPE)
    assert not trajectory.states.requires_grad and trajectory.fresh is None
    x = batch_of(found).draws.normal(*SHAPE)
    for level, row in zip(found.levels[:-1], found.process.rows(nfe), strict=True):
        levels = level.expand(12)
        clean = found.process.clean(x, levels, found.generator(x, levels, batch.conditioning))
        x = row.a * x + row.b * clean + row.c * x
    torch.testing.assert_close(trajectory.states[-1], x.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_rollout_in_parts_is_the_same(eta: float) -> None:
    whole, parted = (made(micro_batch=size) for size in (0, 3))
    one, two = (found.roll_out(batch_of(found), eta) for found in (whole, parted))
    torch.testing.assert_close(one.states, two.states, rtol=1e-5, atol=1e-5)
    assert (one.fresh is None) == (two.fresh is None) == (eta == 0)
    if one.fresh is not None and two.fresh is not None:
        assert torch.equal(one.fresh, two.fresh)
        part = one.part(slice(3, 6))
        assert part.fresh is not None and torch.equal(part.fresh, one.fresh[:, 3:6])


@each_process
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_differentiated_step_goes_where_the_rollout_went(kind: str, eta: float) -> None:
    """With unchanged weights, predicting from a stored boundary gives the stored boundary below it again."""
    found = made(kind)
    batch = batch_of(found)
    trajectory = found.roll_out(batch, eta)
    taken = found.step(batch, trajectory, eta)
    each = torch.arange(12)
    torch.testing.assert_close(taken.following, trajectory.states[taken.k + 1, each], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taken.clean.detach(), trajectory.clean[taken.k, each], rtol=1e-4, atol=1e-4)
    assert taken.clean.requires_grad and not taken.following.requires_grad
    assert torch.equal(taken.low, found.levels[taken.k + 1])


def test_the_stochastic_rollout_puts_fresh_noise_in() -> None:
    found = made()
    still, renoised = (found.roll_out(batch_of(found), eta) for eta in (0.0, 1.0))
    assert torch.equal(still.states[0], renoised.states[0])
    assert not torch.allclose(still.states[1], renoised.states[1])
    assert renoised.fresh is not None
    low = found.levels[1].expand(12)
    noise = noise_of(found.process, renoised.states[1], low, renoised.clean[0])
    torch.testing.assert_close(noise, renoised.fresh[0], rtol=1e-4, atol=1e-4)


@each_process
@pytest.mark.parametrize("interval", ["separate", "shared"])
@pytest.mark.parametrize("nfe", [1, 4, 8])
def test_levels_lie_above_their_step(kind: str, interval: str, nfe: int) -> None:
    found = made(kind, nfe=nfe, interval=interval)
    u, k = torch.rand(2000, generator=torch.Generator().manual_seed(1)), torch.arange(2000) % nfe
    tau = found.level_above(k, found.levels[k + 1], u)
    assert (tau > found.levels[k + 1]).all() and (tau <= found.top).all()
    if interval == "separate":
        assert (tau <= found.levels[k]).all()
    elif nfe > 1:
        assert (tau[k == nfe - 1] > found.levels[nfe - 1]).any()


def test_nothing_pulls_where_the_fake_score_is_an_unguided_teacher() -> None:
    found = made(moved=False, guidance=1.0)
    batch = batch_of(found)
    kl, guidance = found.matching(batch, found.step(batch, found.roll_out(batch)))
    assert (kl.abs() < 1e-8).all() and not guidance.any()
    found = made(guidance=4.0)
    batch = batch_of(found)
    kl, guidance = found.matching(batch, found.step(batch, found.roll_out(batch)))
    assert (kl > 0).all() and (guidance > 0).all()


def test_the_anchor_counts_from_the_base() -> None:
    for moved in (False, True):
        found = made(moved=moved, fake_anchor=0.5)
        batch = batch_of(found)
        anchor = found.fake_terms(batch, found.roll_out(batch))["anchor"]
        assert (anchor > 1e-4).all() if moved else not anchor.any()


def reached(found: Student, others: Mapping[str, list[Tensor]]) -> set[str]:
    """Names of the roles that hold a gradient."""
    roles = {"generator": found.generator.parameters, "fake": found.fake.parameters, **others}
    roles["base"] = list(found.trainee.net.parameters())
    return {name for name, tensors in roles.items() if any(p.grad is not None for p in tensors)}


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("target", ["anchored", "bridge"])
def test_every_loss_reaches_its_own_role_only(rank: int, target: str, toy_rewards: Path) -> None:
    """No gradient to the base, the teacher, the rollout or another role; all tensors of the own one get theirs."""
    values = {"rank": rank, "target": target, "fake_anchor": 0.1, "reference": "ema"}
    trainer = reinforcement(r1_config(Path("unused"), **values))
    step(trainer, 1)  # so that no B is zero
    found, surrogate = trainer.student, trainer.surrogate
    batch = batch_of(found, group=4)
    trajectory = found.roll_out(batch)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(4)

    def terms_of(name: str) -> Mapping[str, Tensor]:
        if name == "fake":
            return found.fake_terms(batch, trajectory)
        if name == "surrogate":
            return surrogate.terms(batch, trajectory, advantage)
        return trainer.generator_terms(batch, trajectory)

    for name, role in (("fake", found.fake), ("surrogate", surrogate.role), ("generator", found.generator)):
        terms = terms_of(name)
        torch.stack([term.mean() for term in terms.values() if term.requires_grad]).sum().backward()
        assert reached(found, {"surrogate": surrogate.role.parameters}) == {name}
        assert all(p.grad is not None and bool(p.grad.any()) for p in role.parameters)
        for p in role.parameters:
            p.grad = None
    trainer.close()


def test_a_versions_adapter_is_where_the_generator_starts(tmp_path: Path) -> None:
    trained = made(moved=True)
    trained.generator.save(tmp_path)
    trainee = ToyTrainee()
    trainee.adapter = read_lora(tmp_path / "adapter.safetensors")
    found = student(tdm_config(tmp_path), trainee)
    for mine, theirs in zip(found.generator.parameters, trained.generator.parameters, strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16).float())
    batch = batch_of(found)
    x, level = batch.draws.normal(*SHAPE), found.top.expand(12)
    assert torch.equal(found.fake(x, level, batch.conditioning), found.roles.base(x, level, batch.conditioning))


def test_going_on_from_another_runs_average_and_fake_score(tmp_path: Path) -> None:
    earlier = distillation(tdm_config(tmp_path / "earlier"))
    step(earlier, 3)
    (tmp_path / "earlier").mkdir()
    torch.save(earlier.state(), tmp_path / "earlier" / "state.pt")
    found = student(tdm_config(tmp_path / "later", start=tmp_path / "earlier"))
    assert same(found.generator.parameters, list(earlier.student.average.state_dict().values()))
    assert same(list(found.average.state_dict().values()), found.generator.parameters)
    assert same(found.fake.parameters, earlier.student.fake.parameters)
    with pytest.raises(CheckpointError, match=r"state\.pt is missing; `tdm-serve finetune tdm`"):
        student(tdm_config(tmp_path / "later", start=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"earlier trained 14 tensors and .* of the same base, rank and targets"):
        student(tdm_config(tmp_path / "later", start=tmp_path / "earlier", rank=3))


@pytest.mark.parametrize("rank", [2, 0])
def test_a_loaded_state_continues_bit_for_bit(tmp_path: Path, rank: int) -> None:
    config = tdm_config(tmp_path, rank=rank)
    whole, halves = distillation(config), distillation(config)
    step(halves, 2)
    torch.save(halves.state(), tmp_path / "state.pt")
    again = distillation(config)
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    expected, found = step(whole, 4)[2:], step(again, 2, first=2)
    assert [clockless(row) for row in found] == [clockless(row) for row in expected]
    assert same(whole.student.generator.parameters, again.student.generator.parameters)


def clockless(scalars: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if not name.startswith("seconds_")}


@pytest.mark.parametrize("rank", [2, 0])
def test_checkpointing_and_compiling_are_choices_of_the_config(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recomputed = (distillation(tdm_config(Path("unused"), rank=rank, checkpointing=c)) for c in (False, True))
    assert [clockless(row) for row in step(plain, 2)] == [clockless(row) for row in step(recomputed, 2)]
    assert same(plain.student.generator.parameters, recomputed.student.generator.parameters)
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)  # pyright: ignore[reportUnknownLambdaType]
    student(tdm_config(Path("unused"), rank=rank, compile=True))
    assert len(compiled) == (1 if rank else 3)  # one network for all roles, or a copy each


def test_the_generator_that_is_scored_lags_behind() -> None:
    found = made(ema=0.9)
    live = bits(found.generator.parameters)
    found.average.update(1000)
    with found.average.applied():
        assert not same(found.generator.parameters, live)
    assert same(found.generator.parameters, live)


OUT_OF_RANGE: list[tuple[str, object]] = [
    ("seed", -1), ("steps", 0), ("decay_steps", 0), ("warmup", 0), ("nfe", 0), ("nfe", 9), ("guidance", -0.5),
    ("guidance", float("nan")), ("rank", -1), ("alpha", 0.0), ("generator_rate", -1e-4), ("fake_rate", -1e-4),
    ("fake_updates", -1), ("fake_anchor", -0.1), ("clip", 0.0), ("weight_decay", -0.1), ("ema", -0.1), ("ema", 1.1),
    ("micro_batch", -1), ("save_every", 0), ("score_every", 0), ("score_prompts", 0), ("text_tokens", 40),
]  # fmt: skip
ONLY_R1: list[tuple[str, object]] = [
    ("groups", 0), ("group", 1), ("reward_workers", 0), ("reward_timeout_s", 0.0), ("kl_weight", -1.0),
    ("tdm_weight", 1.5), ("trunc_steps", 0), ("eta", 1.5), ("fake_warmup", -1), ("surrogate_rate", -1.0),
    ("beta", -1.0), ("surrogate_anchor", -1.0), ("old_clip", -1.0), ("drift_clip", -1.0), ("reference_decay", 1.5),
    ("surrogate_time_min", -0.1), ("generator_time_min", 1.5), ("surrogate_guidance", -1.0), ("micro_batch", 24),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        *((cls, *pair) for cls in (TdmConfig, TdmR1Config) for pair in OUT_OF_RANGE),
        *((TdmR1Config, *pair) for pair in ONLY_R1),
        (TdmConfig, "batch", 0),
        (TdmConfig, "fake_updates", 0),
    ],
)
def test_settings_out_of_range(cls: type[TdmConfig | TdmR1Config], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}; (it must|a few-step)"):
        cast(Any, cls)(**{field: value})


def test_sharding_needs_a_frozen_base_to_shard() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        tdm_config(Path("unused"), rank=0, shard=True)


def test_compilation_and_recomputation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="compile and checkpointing are both on"):
        tdm_config(Path("unused"), compile=True, checkpointing=True)
