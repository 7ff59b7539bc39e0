"""Several processes as one trainer, and a process that dies: real ones, on the toy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_driver import Run, recorded, remembering, train
from toy_trainee import close, same

DRIVER = Path(__file__).with_name("toy_driver.py")
Task = dict[str, Any]


def task(folder: Path, name: str, method: str = "tdm-r1", world: str = "toy", **config: Any) -> Task:
    settings = {**config, "run": str(folder / name)}
    return {"method": method, "world": world, "config": settings, "record": str(folder / f"{name}.jsonl")}


def in_this_process(one: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", remembering(Path(one["record"])))
        train(one)


def weights(one: Task) -> dict[str, list[Tensor]]:
    """Of every role and average in the saved state."""
    state: dict[str, Any] = torch.load(Path(one["config"]["run"]) / "state.pt", weights_only=True)
    found = {"generator": state["generator"], "fake": state["fake"], "average": list(state["average"].values())}
    return found | ({"surrogate": state["surrogate"]["role"]} if "surrogate" in state else {})


def in_a_process(tasks: list[Task], folder: Path, environment: dict[str, str], *launcher: str) -> int:
    plan = folder / "plan.json"
    plan.write_text(json.dumps(tasks))
    command = [sys.executable, *launcher, str(DRIVER), str(plan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode not in (0, -signal.SIGKILL):
        pytest.fail(done.stderr[-3000:])
    return done.returncode


def test_a_killed_run_continues_bit_for_bit(
    tmp_path: Path, toy_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with -9 behind its last state and resumed, the next 20 losses are those of a run never stopped."""
    settings: Task = {"steps": 30, "save_every": 4, "score_every": 15, "reference": "ema", "fake_warmup": 2}
    whole, killed = (task(tmp_path, name, **settings) for name in ("whole", "killed"))
    environment = toy_environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert in_a_process([killed | {"kill_at": 10}], tmp_path, environment) == -signal.SIGKILL
    assert [row["step"] for row in recorded(Path(killed["record"]))] == list(range(1, 11))
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 8
    for one in (whole, killed):
        in_this_process(one, monkeypatch)
    expected, found = (recorded(Path(one["record"])) for one in (whole, killed))
    assert found[:10] == expected[:10]
    assert found[10:] == expected[8:] and len(found[10:]) == 22
    assert len({row["generator_kl"] for row in found[10:]}) == 22
    one, other = weights(whole), weights(killed)
    assert all(same(one[name], other[name]) for name in one)
    files = [load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "killed")]
    assert same(list(files[0].values()), list(files[1].values()))
    last = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("whole", "killed")]
    assert last[0]["val_soft"] == last[1]["val_soft"]


SCALES: dict[str, Task] = {
    "lora": {"steps": 3, "groups": 4, "advantage_scale": "batch"},
    "full": {"steps": 3, "groups": 4, "rank": 0, "micro_batch": 4, "advantage": "binary"},
    "prompt": {"steps": 3, "groups": 2, "advantage_scale": "prompt", "reference": "ema", "eta": 0.5},
}
SHARDS: dict[str, Task] = {
    "toy": {"method": "tdm-r1", "steps": 3, "groups": 2, "reference": "ema"},
    "recomputed": {"method": "tdm-r1", "steps": 3, "groups": 2, "checkpointing": True, "micro_batch": 4},
    "zimage": {"method": "tdm", "world": "zimage", "steps": 2, "batch": 4},
    "zimage-recomputed": {"method": "tdm", "world": "zimage", "steps": 2, "batch": 4, "checkpointing": True},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, toy_environment: dict[str, str]) -> Path:
    """What two processes made of all runs: one start of torchrun for the module."""
    folder = tmp_path_factory.mktemp("two")
    tasks = [task(folder, name, **settings) for name, settings in SCALES.items()]
    tasks += [task(folder, f"shard-{name}", **settings, shard=True) for name, settings in SHARDS.items()]
    tasks += [task(folder, "uneven", groups=3)]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert in_a_process(tasks, folder, toy_environment, *launcher) == 0
    return folder


def compare(alone: Task, together: Task) -> None:
    expected, found = (recorded(Path(one["record"])) for one in (alone, together))
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and len(one) > 5
        assert one.pop("step") == other.pop("step")
        for name, value in one.items():
            assert float.fromhex(other[name]) == pytest.approx(float.fromhex(value), rel=1e-5, abs=1e-7), name
    first, second = weights(alone), weights(together)
    assert first.keys() == second.keys()
    assert all(close(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALES)
def test_two_processes_are_as_one(
    two: Path, name: str, tmp_path: Path, toy_rewards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = task(tmp_path, name, **SCALES[name])
    in_this_process(alone, monkeypatch)
    compare(alone, task(two, name))
    written = {path.name for path in (two / name).iterdir()}
    assert {"config.json", "log.jsonl", "sheet.png", "state.pt", "version.json"} <= written
    assert len((two / name / "log.jsonl").read_text().splitlines()) == 2  # by one process alone


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDS)
def test_a_sharded_base_is_as_a_whole_one(
    two: Path, name: str, tmp_path: Path, toy_rewards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = task(tmp_path, f"shard-{name}", **SHARDS[name])
    in_this_process(alone, monkeypatch)
    compare(alone, task(two, f"shard-{name}"))
    held = [float((folder / f"shard-{name}" / "held.txt").read_text()) for folder in (tmp_path, two)]
    assert held == [1.0, 0.5]  # of the blocks, in one process


@pytest.mark.slow
def test_groups_that_do_not_divide_are_refused(two: Path) -> None:
    (row,) = recorded(two / "uneven.jsonl")
    assert row["error"] == "ConfigError: 3 prompts an update do not divide among 2 processes; use a multiple"
