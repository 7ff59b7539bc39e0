"""What of benchmarks/kernel_speed.py needs no GPU: the refusal, the targets and the tables that `--tune` writes."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tdm_kernels import dispatch
from tdm_kernels.attention import table

Row = dict[str, Any]


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return import_module("kernel_speed")


def test_no_script_hides_hugging_faces_package(root: Path) -> None:
    assert not (root / "benchmarks" / "kernels.py").exists()  # diffusers would import it for theirs


def row(operation: str, shape: Row, **medians: float) -> Row:
    names = {name.replace("_", "-"): {"p50": value, "share_of_copy": value} for name, value in medians.items()}
    return {"operation": operation, "shape": shape, "contenders": names, "refused": {}}


def attention(tokens: int, ragged: bool = False, **medians: float) -> Row:
    shape = {"batch": 2, "heads": 30, "tokens": tokens, "head_dim": 128, "ragged": ragged}
    return row("joint_attention", shape, **medians)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs")
def test_it_refuses_without_a_gpu_in_one_sentence(root: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(root / "benchmarks" / "kernel_speed.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    sentence = "benchmarks/kernel_speed.py measures kernels on an NVIDIA GPU, and torch finds none here\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


def smoke(root: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "kernel_speed.py"), "--smoke", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_case_runs_and_is_right_in_the_interpreter(root: Path, environment: dict[str, str]) -> None:
    """Shapes, contenders and checks of the run on a GPU, so that none fails there for what is wrong with the script."""
    pytest.importorskip("triton")
    done = smoke(root, environment | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *["joint_attention"] * 5,
        "quantised_attention",
        *["group_norm_silu"] * 2,
        *["qk_norm_rope"] * 2,
    ]
    assert all("flex" in line and "sdpa" in line for line in lines[:5])
    assert "pointer" not in lines[4], "no kernel of ours takes a head dimension of 40"


@pytest.mark.parametrize(
    ("arguments", "interpret", "says"),
    [
        ((), "0", "--smoke runs the kernels in Triton's interpreter; set TRITON_INTERPRET=1"),
        (("--tune",), "1", "--smoke measures nothing, so it cannot go with --tune or --keep"),
    ],
)
def test_a_smoke_run_that_cannot_be(
    root: Path, environment: dict[str, str], arguments: tuple[str, ...], interpret: str, says: str
) -> None:
    done = smoke(root, environment | {"TRITON_INTERPRET": interpret}, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", says + "\n")


def test_tuned_tables_are_read_back(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((table, "PATH"), (dispatch, "MEASURED")):
        copy = tmp_path / getattr(module, name).name
        copy.write_text(getattr(module, name).read_text())
        monkeypatch.setattr(module, name, copy)
    rows = [
        attention(1024, cudnn=2.0, flex=0.5, pointer_128x64_w8_s3=3.0),
        attention(4096, True, cudnn=9.0, tma_128x128_s2=5.0),
        row("qk_norm_rope", {}, triton=1.0, compile=2.0),
        row("group_norm_silu", {}, triton=3.0, compile=2.0),
    ]
    for device in ("NVIDIA H100", "NVIDIA H200", "NVIDIA H200"):  # a second time replaces
        benchmark.tune(rows, device)
    found = table.parse(table.PATH.read_text())
    assert [(one.shape.device, one.shape.ragged, one.backend, one.variant) for one in found] == [
        (device, ragged, backend, variant)
        for device in ("NVIDIA H100", "NVIDIA H200")
        for ragged, backend, variant in ((False, "cudnn", None), (True, "triton", "tma-128x128-s2"))
    ]
    dispatch._measured.cache_clear()
    assert dispatch._measured() == {("qk_norm_rope", device) for device in ("NVIDIA H100", "NVIDIA H200")}
    dispatch._measured.cache_clear()
    benchmark.replace(table.PATH, "rows", [], "NVIDIA H200")
    assert len(table.parse(table.PATH.read_text())) == 2


def test_targets_take_the_worst_shape(benchmark: ModuleType) -> None:
    rows = [
        attention(1024, cudnn=2.0, pointer_128x64_w8_s3=2.0),
        attention(4096, cudnn=1.8, pointer_128x64_w8_s3=2.0, tma_128x128_s2=4.0),
        attention(4096, True, cudnn=3.0, tma_128x128_s2=2.0),
        row("qk_norm_rope", {}, triton=0.9),
    ]
    found = {one["target"]: (one["measured"], one["verdict"]) for one in benchmark.verdicts(rows)}
    assert found["attention, head dimension 128, over cuDNN"] == (0.9, "not met")
    assert found["attention, head dimension 64, over cuDNN"] == (None, "not measured")
    assert found["attention with 20 to 50 % padding, over cuDNN with a mask"] == (1.5, "met")
    assert found["QK-norm with RoPE, share of copy bandwidth"] == (0.9, "met")
    assert found["QK-norm with RoPE, over torch.compile"] == (None, "not measured")
