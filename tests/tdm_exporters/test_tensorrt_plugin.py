"""The TensorRT plugin against NVIDIA's own validators and classes, without TensorRT's libraries.

The bindings are loaded with three empty libraries in place of NVIDIA's, in a process of their own. What cannot be seen
here is that libnvinfer launches what it was told; `test_tensorrt_gpu.py` launches the same on a GPU without it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tdm_exporters.tensorrt_library import OLDEST, bindings, check_version
from tdm_exporters.tensorrt_plugin import INPUTS, PLAIN, RAGGED, TACTICS, register, tactics
from tdm_kernels.aot.ptx import assemble, parameters
from tdm_kernels.attention import launch
from tdm_kernels.attention.variants import CAPABILITIES, HEAD_DIMS, VARIANTS
from tdm_serve.errors import BackendUnavailable, InvalidRequest, MissingExtra

HERE = Path(__file__).parent
APART = Path(sys.prefix) / "tensorrt"  # where `make test` puts the bindings
Script = Callable[..., Any]
SHAPES = (
    {"batch": 2, "heads": 3, "queries": 333, "keys": 333},
    {"batch": 1, "heads": 24, "queries": 4097, "keys": 4250},
    {"batch": 3, "heads": 5, "queries": 1, "keys": 77},
    {"batch": 1, "heads": 1, "queries": 128, "keys": 128},
)
CASES = {
    "plain": (PLAIN, "BF16", 128, 2),
    "ragged": (RAGGED, "BF16", 128, 3),
    "narrow": (RAGGED, "HALF", 64, 1),
}


@pytest.fixture(scope="module")
def contract(with_stubs: Script) -> Mapping[str, Any]:
    """What NVIDIA's classes made of our plugin for compute capability 9.0."""
    assert APART.is_dir(), f"{APART} is missing; run `make test`"
    asked = {"capability": 90, "shapes": SHAPES, "cases": CASES | {"uncompiled": (PLAIN, "HALF", 64, None)}}
    return with_stubs(HERE / "tensorrt_contract.py", json.dumps(asked))


def launched(case: str, shape: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Grid, integers and the number of tensors that the kernels' own launcher uses for contiguous tensors."""
    name, _, head_dim, tactic = CASES[case]
    seen: list[tuple[Any, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def call(*arguments: Any, **_: Any) -> None:
                tensors = [one for one in arguments if isinstance(one, Tensor)]
                seen.append((grid, [one for one in arguments if isinstance(one, int)], len(tensors)))

            return call

    monkeypatch.setattr(launch, "_kernel", lambda _: Recorder())
    q = torch.empty((shape["batch"], shape["heads"], shape["queries"], head_dim), device="cpu")
    k = q.new_empty((shape["batch"], shape["heads"], shape["keys"], head_dim))
    lengths = torch.ones(shape["batch"], dtype=torch.int32) if name == RAGGED else None
    launch.run(VARIANTS[TACTICS[tactic]], q, k, k, lengths, torch.empty_like(q), None)
    [found] = seen
    return found


@pytest.mark.parametrize("case", CASES)
def test_launches_are_those_of_the_kernels_own_launcher(
    contract: Mapping[str, Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, head_dim, tactic = CASES[case]
    made = contract["found"][case]
    assert len(made["launches"]) == len(SHAPES)
    for shape, found in zip(SHAPES, made["launches"], strict=True):
        grid, integers, tensors = launched(case, shape, monkeypatch)
        assert (found["grid_x"], found["grid_y"], found["grid_z"]) == grid
        assert found["integers"] == integers
        assert tensors == len(INPUTS[name]) + 1
        assert (found["block_x"], found["block_y"], found["block_z"]) == (VARIANTS[TACTICS[tactic]].warps * 32, 1, 1)
        assert 0 < found["shared_mem"] <= 227 * 1024
    assert made["out"] == [[one["batch"], one["heads"], one["queries"], head_dim] for one in SHAPES]


@pytest.mark.parametrize("case", CASES)
def test_ptx_takes_inputs_integers_and_the_output_and_is_assembled_again(
    contract: Mapping[str, Any], case: str
) -> None:
    made, inputs = contract["found"][case], len(INPUTS[CASES[case][0]])
    kinds = ["u64" if ".u64" in one else "u32" for one in parameters(made["ptx"])]
    assert kinds == ["u64"] * inputs + ["u32"] * len(made["launches"][0]["integers"]) + ["u64"]
    assert re.search(rf"\.entry {made['entry']}\(", made["ptx"])
    assert re.search(r"^\.target sm_90a$", made["ptx"], re.MULTILINE)
    assert len(assemble(made["ptx"])) > 1000
    version = re.search(r"^\.version (\d+)\.(\d+)$", made["ptx"], re.MULTILINE)
    assert version is not None
    assert (int(version[1]), int(version[2])) <= (9, 0), "the newest that driver 580 takes"


@pytest.mark.parametrize("case", [*CASES, "uncompiled"])
def test_types_and_tactics_that_tensorrt_may_time(contract: Mapping[str, Any], case: str) -> None:
    made = contract["found"][case]
    name, head_dim = CASES.get(case, (PLAIN, "HALF", 64, None))[::2]
    lengths = [["INT32", "LINEAR"]] * (name == RAGGED)
    assert made["offered"] == [
        one for kind in ("BF16", "HALF") for one in ([[kind, "LINEAR"]] * 3 + lengths + [[kind, "LINEAR"]])
    ]
    assert made["same_type"]
    assert made["tactics"] == sorted(tactics(int(head_dim), 90)) == ([1, 2, 3] if head_dim == 64 else [2, 3])


def test_refusals(contract: Mapping[str, Any]) -> None:
    refused = contract["refused"]
    assert "head dimension 96; allowed: 64, 128. Export with --attention standard" in refused["head"]
    assert "open head dimension; it must be fixed" in refused["open"]
    assert "compute capability 9.0, and 8.9 was asked for" in refused["card"]
    with pytest.raises(InvalidRequest, match="head dimension 32; allowed: 64, 128"):
        tactics(32, 90)
    with pytest.raises(InvalidRequest, match=r"no kernels for compute capability 10\.3; allowed: 8\.0, 8\.6"):
        register(103)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_card_has_a_tactic_without_scratch_memory(head_dim: int, capability: int) -> None:
    found = [VARIANTS[TACTICS[number]] for number in tactics(head_dim, capability)]
    assert found
    assert all(one.loads == "pointer" and capability in one.cards[head_dim] for one in found)


def test_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    bindings.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'tdm-serve\[tensorrt\]'"):
        bindings()
    (tmp_path / "tensorrt.py").write_text("import tensorrt_bindings\n")
    monkeypatch.syspath_prepend(APART)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"its libraries are not: libnv\w+\.so\.11: .*; run: pip install"):
        bindings()
    with pytest.raises(BackendUnavailable, match=r"TensorRT 10\.13\.2 is installed; .* needs 10\.14"):
        check_version("10.13.2")
    check_version("10.14.1.48")
    check_version("11.4.0.106")


def test_the_plugin_is_named_as_in_our_graphs() -> None:
    from tdm_exporters.attention import DOMAIN, NAME, QKV

    assert f"{DOMAIN}::{NAME}" == PLAIN
    assert INPUTS[PLAIN] == QKV


def test_the_bindings_are_those_of_the_makefile() -> None:
    makefile = (HERE.parents[1] / "Makefile").read_text()
    [pinned] = re.findall(r"^TENSORRT := tensorrt-cu13-bindings==(\S+)$", makefile, re.MULTILINE)
    assert (APART / f"tensorrt_cu13_bindings-{pinned}.dist-info").is_dir()
    assert tuple(int(one) for one in pinned.split(".")[:2]) >= OLDEST
