"""Real TensorRT-RTX engines from our ONNX graphs, built without a GPU. None is run: that needs one."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import onnx
import pytest
import torch
from tiny_checkpoint import options

from tdm_exporters.export import export
from tdm_exporters.network import Span, spans
from tdm_exporters.parts import Limits
from tdm_exporters.rtx_build import Built, Target, build
from tdm_exporters.rtx_library import bindings, known_capabilities
from tdm_exporters.zimage import parts_of
from tdm_serve.errors import BackendUnavailable, InvalidRequest, MissingExtra
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.load import load

pytestmark = pytest.mark.slow  # for the exports; a build takes less than a second

APART = Path(sys.prefix) / "rtx"  # where `make test` puts TensorRT-RTX
CONSUMER = ("8.6", "8.9", "12.0")
ATTENTION = ("text_encoder", "refiner", "denoiser")

PARTS = ("modulation", "text_encoder", "refiner", "denoiser", "decoder")

Profiles = Mapping[str, Mapping[str, Span]]
Build = Callable[..., Built]


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels within reach; `make test` installs them, so their absence is a failure and no skip."""
    assert APART.is_dir(), f"{APART} is missing; run `make test`"
    monkeypatch.syspath_prepend(APART)


@pytest.fixture(scope="module")
def graphs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of ONNX graphs by type, and one with decomposed attention."""
    folder = tmp_path_factory.mktemp("graphs")
    asked = {"fp16": ("fp16", "standard"), "bf16": ("bf16", "standard"), "fp32": ("fp32", "standard")}
    asked["loose"] = ("fp32", "decomposed")
    for name, (dtype, attention) in asked.items():
        export(replace(options(tiny, folder / name), dtype=dtype, attention=attention, verify=False))
    return {name: folder / name for name in asked}


@pytest.fixture(scope="module")
def profiles(tiny: Path) -> Profiles:
    """Of all parts, for the sizes, batches and texts of `options`."""
    model = cast(ZImage, load(str(tiny), "cpu", "float32").model)
    with torch.no_grad():
        return {part.name: spans(part) for part in parts_of(model, Limits(3, ((128, 128), (64, 96)), 64))}


def attention_nodes(graph: Path) -> int:
    return sum(node.op_type == "Attention" for node in onnx.load(str(graph)).graph.node)


@pytest.fixture
def built(rtx: None, profiles: Profiles) -> Build:
    """Builds a part of a folder with its profile."""

    def run(folder: Path, part: str, engine: Path, *capabilities: str, refit: tuple[str, ...] = ()) -> Built:
        return build(folder / f"{part}.onnx", engine, Target(capabilities, profiles[part], refit))

    return run


def test_profiles(profiles: Profiles) -> None:
    assert set(profiles) == set(PARTS)
    largest = (3, 4, 16, 16)
    assert profiles["decoder"] == {"latents": Span((1, 4, 2, 2), largest, largest)}
    assert profiles["denoiser"]["text"] == Span((1, 32, 32), (3, 64, 32), (3, 64, 32))
    assert profiles["text_encoder"]["ids"] == Span((1, 64), (3, 64), (3, 64)), "always padded to its longest"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_for_every_card(
    built: Build, graphs: Mapping[str, Path], tmp_path: Path, part: str, dtype: str
) -> None:
    made = built(graphs[dtype], part, tmp_path / "engine", *CONSUMER)
    assert made.compute_capabilities == CONSUMER
    assert made.version == bindings().__version__
    assert (tmp_path / "engine").stat().st_size == made.bytes > 0
    floats = {kind for name, kind in made.inputs.items() if name not in ("sigma", "ids", "mask", "lengths")}
    assert floats <= {{"fp16": "HALF", "bf16": "BF16"}[dtype]}, "strongly typed: as the graph says"
    assert made.loose_softmax == 0
    assert made.fused_attention == attention_nodes(graphs[dtype] / f"{part}.onnx")
    assert (made.fused_attention > 0) == (part in ATTENTION), "every attention, as one layer, and no other"


@pytest.mark.parametrize("capability", CONSUMER)
def test_one_card_by_itself(built: Build, graphs: Mapping[str, Path], tmp_path: Path, capability: str) -> None:
    one = built(graphs["fp16"], "denoiser", tmp_path / "one", capability)
    assert one.compute_capabilities == (capability,)
    assert one.fused_attention == 2


def test_attention_without_a_fused_kernel_is_refused_and_decomposed_is_built(
    built: Build, graphs: Mapping[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=r"no fused attention .* --dtype fp16 or bf16, or --attention decomposed"):
        built(graphs["fp32"], "denoiser", tmp_path / "engine", "8.9")
    assert not (tmp_path / "engine").exists()
    loose = built(graphs["loose"], "denoiser", tmp_path / "engine", "8.9")
    assert (loose.fused_attention, loose.loose_softmax) == (0, 2), "what the count of fused layers tells apart"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the builder says without a GPU")
def test_refit_takes_the_graph_s_weights_by_name(built: Build, graphs: Mapping[str, Path], tmp_path: Path) -> None:
    """Up to the point where the builder wants a GPU: every linear's weight is known to it under the graph's name."""
    graph = onnx.load(str(graphs["fp16"] / "denoiser.onnx")).graph
    weights = {one.name for one in graph.initializer}
    read = {name for node in graph.node if node.op_type in ("Gemm", "MatMul") for name in node.input}
    linears = tuple(sorted(weights & read))
    assert len(linears) >= 8
    with pytest.raises(BackendUnavailable, match=r"denoiser\.onnx with weights to replace only beside a GPU"):
        built(graphs["fp16"], "denoiser", tmp_path / "engine", "8.9", refit=linears)
    assert not (tmp_path / "engine").exists()
    with pytest.raises(InvalidRequest, match="no weight 'nobody'"):
        built(graphs["fp16"], "denoiser", tmp_path / "engine", "8.9", refit=("nobody",))


def test_capabilities(built: Build, graphs: Mapping[str, Path], tmp_path: Path) -> None:
    assert set(CONSUMER) <= set(known_capabilities())
    for name, why in (("9.0", "does not support Hopper; allowed: 7.5, 8.0"), ("1.2", "does not know it; allowed")):
        with pytest.raises(InvalidRequest, match=rf"--compute-capability has '{name}': TensorRT-RTX {why}"):
            built(graphs["fp16"], "modulation", tmp_path / "engine", name)
    with pytest.raises(InvalidRequest, match=r"names none; allowed: 7\.5"):
        built(graphs["fp16"], "modulation", tmp_path / "engine")


@pytest.mark.parametrize("wrong", [{}, {"sigma": Span((1, 1), (2, 1), (3, 1))}, {"sigma": Span((3,), (2,), (3,))}])
def test_profiles_that_do_not_fit(
    rtx: None, graphs: Mapping[str, Path], tmp_path: Path, wrong: Mapping[str, Span]
) -> None:
    with pytest.raises(InvalidRequest, match=r"modulation\.onnx: the profile of sigma is"):
        build(graphs["fp16"] / "modulation.onnx", tmp_path / "engine", Target(("8.9",), wrong))


def test_a_file_that_is_no_graph(rtx: None, tmp_path: Path) -> None:
    (tmp_path / "odd.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidRequest, match=r"TensorRT-RTX cannot read odd\.onnx: "):
        build(tmp_path / "odd.onnx", tmp_path / "engine", Target(("8.9",), {}))


def test_without_the_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(APART)])
    for name in [name for name in sys.modules if name.startswith("tensorrt_rtx")]:
        monkeypatch.delitem(sys.modules, name)
    bindings.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'tdm-serve\[tensorrt-rtx\]'"):
        bindings()


def test_the_test_environment_has_the_extra_s_versions() -> None:
    root = Path(__file__).parents[2]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tensorrt-rtx"]
    assert f"RTX := {' '.join(extra)}\n" in (root / "Makefile").read_text()
