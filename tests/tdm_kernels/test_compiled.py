"""Kernels compiled ahead of time, in a process of their own, against the table of gates; PTX that others can launch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdm_kernels.aot.attention import attention_name
from tdm_kernels.aot.binary import REGISTERS, SHARED_LIMITS, contents
from tdm_kernels.aot.compiling import WARP, Compiled, compile_release
from tdm_kernels.aot.ptx import assemble, embeddable, parameters, strip_scratch
from tdm_kernels.aot.releases import RELEASES
from tdm_kernels.attention.variants import VARIANTS, default
from tdm_kernels.errors import BadArgument, KernelUnavailable
from tests.tdm_kernels.gates import GATES, Gate

pytest.importorskip("triton", reason="kernels are compiled by Triton, which is not installed")

FAST, SLOW = [gate for gate in GATES if not gate.slow], [gate for gate in GATES if gate.slow]
GATED = {(gate.name, gate.capability) for gate in GATES}
ATTENTION_CARDS, STREAMING_CARDS, FP16_CARDS = SHARED_LIMITS.keys(), {80, 90, 120}, {90}
Reports = dict[tuple[str, int], dict[str, Any]]


def compiled(targets: list[str], environment: dict[str, str]) -> Reports:
    done = subprocess.run(
        [sys.executable, "-m", "tdm_kernels.aot", "report", *targets],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {(line["name"], line["capability"]): line for line in lines}


@pytest.fixture(scope="module")
def fast(environment: dict[str, str]) -> Reports:
    """One process compiles all fast gates."""
    return compiled([gate.target for gate in FAST], environment)


@pytest.fixture(scope="module")
def slow(environment: dict[str, str]) -> Reports:
    return compiled([gate.target for gate in SLOW], environment)


def check(gate: Gate, reports: Reports) -> None:
    report = reports[gate.name, gate.capability]
    check_fits(report)
    assert report["registers"] <= gate.registers
    for needed in gate.needs:
        assert report["instructions"].get(needed, 0) > 0, f"no {needed} in {report['instructions']}"


def check_fits(report: dict[str, Any]) -> None:
    assert "error" not in report, report["error"]
    assert (report["spills"], report["stack_bytes"]) == (0, 0)
    assert report["shared_bytes"] <= SHARED_LIMITS[report["capability"]] * 1024
    assert report["registers"] * report["threads"] <= REGISTERS


@pytest.mark.parametrize("gate", FAST, ids=lambda gate: gate.target)
def test_gate(gate: Gate, fast: Reports) -> None:
    check(gate, fast)


@pytest.mark.slow
@pytest.mark.parametrize("gate", SLOW, ids=lambda gate: gate.target)
def test_slow_gate(gate: Gate, slow: Reports) -> None:
    check(gate, slow)


def others() -> Iterator[tuple[str, int]]:
    """Releases without a gate, fewer cards for what hardly depends on the card or is a twin of a bfloat16 kernel."""
    for name, release in RELEASES.items():
        cards = ATTENTION_CARDS if release.function == "attention" else STREAMING_CARDS
        wanted = FP16_CARDS if "-fp16-" in name else cards
        yield from ((name, card) for card in release.capabilities if card in wanted and (name, card) not in GATED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_other_release_fits_its_cards(environment: dict[str, str]) -> None:
    targets = [f"{name}@{card}" for name, card in others()]
    for report in compiled(targets, environment).values():
        check_fits(report)


def test_what_runs_by_default_has_a_gate() -> None:
    for head_dim in (64, 128):
        for card in SHARED_LIMITS:
            name = attention_name("bf16", head_dim, default(head_dim, divmod(card, 10)))
            assert (name, card) in GATED
    specialised = {name for name, variant in VARIANTS.items() if variant.loads == "tma"}
    assert {name for name in specialised if any(f"-{name}-" in gate.name for gate in GATES)} == specialised


@pytest.fixture(scope="module")
def made() -> Compiled:
    """One kernel for the tests of its PTX."""
    return compile_release(attention_name("bf16", 64, "pointer-128x64-w4-s3"), 90)


def test_ptx_for_a_plugin_takes_only_the_sources_parameters(made: Compiled) -> None:
    ptx = embeddable(made)
    wanted = made.parameters
    assert wanted == ("*bf16",) * 3 + ("*i32",) + ("i32",) * 15 + ("*bf16",)
    assert len(parameters(made.ptx)) == len(wanted) + 2
    declared = [".u64" if kind.startswith("*") else ".u32" for kind in wanted]
    assert [kind in line for kind, line in zip(declared, parameters(ptx), strict=True)] == [True] * len(wanted)
    assert made.entry in ptx
    assert made.threads == 4 * WARP


def test_stripped_ptx_assembles_to_the_same_kernel(made: Compiled) -> None:
    stripped, whole = contents(assemble(embeddable(made))), contents(made.cubin)
    assert stripped.spills == 0
    assert stripped.instructions["HGMMA"] == whole.instructions["HGMMA"] > 0


def test_parameters_that_are_read_stay(made: Compiled) -> None:
    with pytest.raises(KernelUnavailable, match="reads its parameter attention_param_19"):
        strip_scratch(made.ptx, 19)


def test_broken_ptx_is_refused_in_the_assemblers_words(made: Compiled) -> None:
    with pytest.raises(
        KernelUnavailable, match=r"ptxas refuses the kernel for sm_90a: (?s:.*)known instruction: 'return'"
    ):
        assemble(made.ptx.replace("ret;", "return;", 1))


def test_a_kernel_with_scratch_cannot_be_embedded() -> None:
    name = attention_name("bf16", 64, "tma-128x64-s3")
    with pytest.raises(KernelUnavailable, match=r"needs 384 bytes of scratch .*embed a pointer variant"):
        embeddable(compile_release(name, 90))


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadArgument, match="no kernel is released as 'fast'"):
        compile_release("fast", 90)
    name = attention_name("fp16", 128, "pointer-128x128-w8-s2")
    with pytest.raises(BadArgument, match="not released for compute capability 80; allowed: 90, 100"):
        compile_release(name, 80)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelUnavailable, match="TRITON_INTERPRET"):
        compile_release(name, 90)


def test_build_writes_what_a_launch_needs(tmp_path: Path, environment: dict[str, str]) -> None:
    name = attention_name("bf16", 64, "pointer-128x64-w4-s3")
    command = [sys.executable, "-m", "tdm_kernels.aot", "build", f"{name}@90", "-o", str(tmp_path / "made")]
    subprocess.run(command, env=environment, check=True)
    stem = tmp_path / "made" / f"{name}-sm90"
    facts = json.loads(stem.with_name(stem.name + ".json").read_text())
    assert facts["constants"]["ROWS"] == 128
    assert facts["threads"] == 128
    assert contents(stem.with_name(stem.name + ".cubin").read_bytes()).registers > 0
    assert ".target sm_90a" in stem.with_name(stem.name + ".ptx").read_text()


def test_a_shell_gets_one_sentence(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tdm_kernels.aot", "report", "attention"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: 'attention' is not NAME@CAPABILITY, such as NAME@90\n")
