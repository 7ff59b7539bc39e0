"""Roles: several sets of weights of one network that share a frozen base and never disturb each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from tiny_zimage import TEXT_WIDTH, TinyZImage
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy_trainee import SHAPE, ToyTrainee, bits, diffusion, same

from tdm_finetune.roles import ADAPTER_FILE, FULL_FOLDER, Adapted, LoraRole, Role, Roles
from tdm_finetune.trainee import Conditioning
from tdm_serve.errors import ConfigError
from tdm_serve.models.adapters import fuse_adapters
from tdm_serve.models.lora import read_lora
from tdm_serve.models.spec import Adapter

RANKS = pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
Inputs = tuple[Tensor, Tensor, Conditioning]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(trainee: ToyTrainee, count: int = 6) -> Inputs:
    latents = torch.randn(count, *SHAPE, generator=random(1))
    level = torch.full((count,), trainee.process.levels(4)[1])
    return latents, level, trainee.encode(["bright 3", "", "dark 1", "grey 4", "dark 2", "bright 1"][:count])


def moved(role: Role, seed: int = 7) -> Role:
    """The role with all its weights pushed somewhere else."""
    with torch.no_grad():
        for tensor in role.parameters:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=random(seed)))
    return role


@RANKS
@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_a_new_role_is_the_base(rank: int, kind: str) -> None:
    trainee = ToyTrainee(None if kind == "flow" else diffusion(kind))
    given = inputs(trainee)
    plain = trainee.net(given[0], given[1], *given[2])
    roles = Roles(trainee, rank, 4.0)
    new = roles.new(random())
    assert torch.equal(roles.base(*given), plain)
    torch.testing.assert_close(new(*given), plain, rtol=0, atol=1e-6)
    assert (moved(new)(*given) - plain).abs().max() > 1e-2


def test_a_new_roles_pairs_start_as_pefts_gaussian() -> None:
    trainee = ToyTrainee()
    first, second, again = (Roles(ToyTrainee(), 4, 8.0).new(random(seed)) for seed in (0, 1, 0))
    assert len(first.parameters) == 2 * len(trainee.linears())
    assert all(not b.any() for b in first.parameters[1::2])
    assert float(torch.cat(bits([a.flatten() for a in first.parameters[::2]])).std()) == pytest.approx(1 / 4, rel=0.15)
    assert same(first.parameters, again.parameters) and not same(first.parameters, second.parameters)


def test_merged_and_unmerged_agree() -> None:
    """Which way is cheaper depends on the number of tokens; the result must not."""
    linear = nn.Linear(6, 4).double()
    adapted = Adapted(linear)
    adapted.pair = (
        torch.randn(2, 6, generator=random(), dtype=torch.float64),
        torch.randn(4, 2, generator=random(), dtype=torch.float64),
    )
    adapted.scale = 2.5
    x = torch.randn(30, 6, generator=random(), dtype=torch.float64)
    apart = torch.cat([adapted(row.unsqueeze(0)) for row in x])  # 24 > 10 weights: two thin products
    torch.testing.assert_close(adapted(x), apart, rtol=1e-12, atol=1e-12)
    exact = x @ (linear.weight + 2.5 * adapted.pair[1] @ adapted.pair[0]).T + linear.bias
    torch.testing.assert_close(apart, exact, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(apart, linear(x))


def test_a_picture_does_not_depend_on_its_company() -> None:
    trainee = ToyTrainee()
    role = moved(Roles(trainee, 2, 4.0).new(random()))
    x, level, said = inputs(trainee)
    alone = torch.cat(
        [role(x[i : i + 1], level[i : i + 1], (said[0][i : i + 1], said[1][i : i + 1])) for i in range(6)]
    )
    torch.testing.assert_close(role(x, level, said), alone, rtol=1e-5, atol=1e-6)


@RANKS
def test_roles_do_not_disturb_each_other_or_the_base(rank: int) -> None:
    trainee = ToyTrainee()
    given = inputs(trainee)
    base = bits(list(trainee.net.parameters()))
    roles = Roles(trainee, rank, 4.0)
    one, two = moved(roles.new(random(1)), 3), moved(roles.new(random(2)), 4)
    before = [f(*given) for f in (one, two, roles.base)]
    optimizer = torch.optim.AdamW(one.parameters, 0.1)
    for _ in range(2):
        one(*given).square().mean().backward()
        optimizer.step()
    assert not torch.equal(one(*given), before[0])
    assert torch.equal(two(*given), before[1]) and torch.equal(roles.base(*given), before[2])
    assert same(base, list(trainee.net.parameters()))


@RANKS
def test_gradients_reach_only_the_role_that_ran(rank: int) -> None:
    trainee = ToyTrainee()
    roles = Roles(trainee, rank, 4.0)
    one, two = moved(roles.new(random(1))), moved(roles.new(random(2)))
    given = inputs(trainee)
    output = one(*given)
    two(*given)
    roles.base(*given)
    output.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in one.parameters)
    assert all(p.grad is None for p in [*two.parameters, *trainee.net.parameters()])
    assert not roles.base(*given).requires_grad


def test_outputs_are_float32_whatever_autocast_does() -> None:
    trainee = ToyTrainee()
    roles = Roles(trainee, 2, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert {roles.base(*inputs(trainee)).dtype, roles.new(random())(*inputs(trainee)).dtype} == {torch.float32}


def test_a_saved_role_is_read_back(tmp_path: Path) -> None:
    """In bfloat16: to its rounding; and at another alpha, because the scale is folded into B."""
    trainee = ToyTrainee()
    role = moved(Roles(trainee, 2, 5.0).new(random()))
    role.save(tmp_path)
    output = role(*inputs(trainee))
    assert {delta.scale for delta in read_lora(tmp_path / ADAPTER_FILE).modules.values()} == {2.5}
    for alpha in (5.0, 1.0, 16.0):
        again = Roles(other := ToyTrainee(), 2, alpha).new(random(9), read_lora(tmp_path / ADAPTER_FILE))
        torch.testing.assert_close(again(*inputs(other)), output, rtol=0.02, atol=0.01)
        assert (again(*inputs(other)) - Roles(ToyTrainee(), 2, 1.0).base(*inputs(other))).abs().max() > 0.05
        assert all(tensor.requires_grad and tensor.is_leaf for tensor in again.parameters)
        copy = tmp_path / f"at-{alpha}"
        copy.mkdir()
        again.save(copy)
        torch.testing.assert_close(deltas(copy), deltas(tmp_path), rtol=0.02, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [ADAPTER_FILE]


def deltas(folder: Path) -> dict[str, Tensor]:
    """What a LoRA file adds to each weight."""
    modules = read_lora(folder / ADAPTER_FILE).modules
    return {name: delta.added_to(torch.zeros(delta.shape)) for name, delta in modules.items()}


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    Roles(ToyTrainee(), 2, 4.0).new(random()).save(tmp_path)
    file = read_lora(tmp_path / ADAPTER_FILE)
    with pytest.raises(ConfigError, match=r"rank is 3, but adapter .* has rank 2"):
        Roles(ToyTrainee(), 3, 4.0).new(random(), file)
    with pytest.raises(ConfigError, match=r"rank is 0, which trains full weights, but .*adapter"):
        Roles(ToyTrainee(), 0, 4.0).new(random(), file)
    fewer = ToyTrainee()
    del fewer.linears()["blocks.1.up"]
    with pytest.raises(ConfigError, match=r"other modules .* for example blocks\.1\.up"):
        Roles(fewer, 2, 4.0).new(random(), file)


def zimage_inputs() -> Inputs:
    latents, text = torch.randn(2, 4, 8, 8, generator=random(1)), torch.randn(2, 32, TEXT_WIDTH, generator=random(2))
    return latents, torch.tensor([0.9, 0.3]), (text, torch.tensor([9, 32]))


def test_serving_fuses_what_training_saved(tmp_path: Path) -> None:
    roles = Roles(TinyZImage(), 4, 10.0)
    assert len(roles.adapted) == 28
    role = cast(LoraRole, moved(roles.new(random())))
    role.save(tmp_path)
    served, given = TinyZImage(), zimage_inputs()
    plain = served.net(given[0], given[1], *given[2])
    assert fuse_adapters(served.transformer, (Adapter(tmp_path / ADAPTER_FILE),)) == 28
    fused = served.net(given[0], given[1], *given[2])
    assert (fused - plain).abs().max() > 0.1
    torch.testing.assert_close(role(*given), fused, rtol=0.05, atol=0.05)  # the file is in bfloat16
    with torch.no_grad():
        for tensor in role.parameters:
            tensor.copy_(tensor.to(torch.bfloat16))
    torch.testing.assert_close(role(*given), fused, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(roles.base(*given), plain, rtol=0, atol=0)


def test_a_full_role_is_saved_as_the_familys_folder(tmp_path: Path) -> None:
    trainee = ToyTrainee()
    base = bits(list(trainee.net.parameters()))
    role = moved(Roles(trainee, 0, 1.0).new(random()))
    role.save(tmp_path)
    written = load_file(tmp_path / FULL_FOLDER / "toy.safetensors")
    assert same([written[name] for name, _ in trainee.net.named_parameters()], role.parameters)
    assert same(base, list(trainee.net.parameters()))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        role.save(tmp_path / "file")
    assert same(base, list(trainee.net.parameters()))  # also where it could not be written


def gradients(make: Callable[[], tuple[Roles, list[nn.Module]]], given: Inputs, *, again: bool) -> list[Tensor]:
    """Loss and gradients of one role, while others run between its forward and its backward pass."""
    roles, blocks = make()
    if again:
        roles.recompute(blocks)
    one, two = moved(roles.new(random(1)), 3), moved(roles.new(random(2)), 4)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = one(*given).square().mean()
        with torch.no_grad():
            two(*given)
        second = two(*given).square().mean()
        roles.base(*given)
        (loss + 2 * second).backward()
    return [loss.detach(), *(cast(Tensor, p.grad) for p in (*one.parameters, *two.parameters))]


@RANKS
def test_checkpointing_changes_memory_and_nothing_else(rank: int) -> None:
    trainee = ToyTrainee()

    def toy() -> tuple[Roles, list[nn.Module]]:
        fresh = ToyTrainee()
        return Roles(fresh, rank, 4.0), list(fresh.blocks())

    plain, recomputed = (gradients(toy, inputs(trainee), again=again) for again in (False, True))
    assert same(plain, recomputed)
    assert all(bool(tensor.any()) for tensor in plain)


def test_checkpointing_z_image() -> None:
    def tiny() -> tuple[Roles, list[nn.Module]]:
        fresh = TinyZImage()
        return Roles(fresh, 2, 4.0), list(fresh.blocks())

    plain, recomputed = (gradients(tiny, zimage_inputs(), again=again) for again in (False, True))
    assert same(plain, recomputed)


@RANKS
def test_checkpointed_blocks_run_again_in_the_backward_pass(rank: int) -> None:
    trainee = ToyTrainee()
    roles = Roles(trainee, rank, 4.0)
    roles.recompute(trainee.blocks())
    role = roles.new(random())
    calls = 0

    def count(_module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal calls
        calls += 1

    net = trainee.net if rank else cast(nn.Module, role.net)  # pyright: ignore[reportAttributeAccessIssue]
    net.get_submodule("blocks.1.up").register_forward_hook(count)
    output = role(*inputs(trainee))
    assert calls == 1
    output.mean().backward()
    assert calls == 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_serves_all_roles(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles differ in their numbers only, so no role but the first is compiled: once for the base, twice with a role.

    The second time is with gradients; torch.compile keeps forward passes with and without apart.
    """
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    trainee, plain = ToyTrainee(), ToyTrainee()
    compiled, eager = Roles(trainee, 2, 4.0, compiled=True), Roles(plain, 2, 4.0)
    pairs = [(moved(compiled.new(random(i)), i), moved(eager.new(random(i)), i)) for i in range(3)]
    given = inputs(trainee)
    counts: list[int] = []
    torch.testing.assert_close(compiled.base(*given), eager.base(*given))
    counts.append(counter.frame_count)
    for fast, slow in pairs:
        with torch.no_grad():
            torch.testing.assert_close(fast(*given), slow(*given), rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    for fast, slow in pairs:
        for role in (fast, slow):
            role(*given).square().mean().backward()
        for p, q in zip(fast.parameters, slow.parameters, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 3, 3, 3]
    torch.compiler.reset()
