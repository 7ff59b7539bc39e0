"""The graphs themselves: three ways of attention with one result, in ONNX Runtime and in onnx's own reference."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tdm_exporters import int8, onnx_format
from tdm_exporters.parts import Limits, Part
from tdm_exporters.zimage import parts_of
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.load import load


@pytest.fixture(scope="module")
def parts(tiny: Path) -> dict[str, Part]:
    model = load(tiny, "cpu", "float32").model
    assert isinstance(model, ZImage)
    with torch.no_grad():
        return {part.name: part for part in parts_of(model, Limits(3, ((128, 128),), 64))}


def operators(path: Path) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in onnx.load(path).graph.node)


def feeds(part: Part) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in part.inputs.items()}


def expected(part: Part) -> np.ndarray:
    with torch.no_grad():
        return part.module(*part.inputs.values()).numpy()


def opened(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def in_runtime(path: Path, part: Part) -> np.ndarray:
    return opened(path).run(None, feeds(part))[0]


@pytest.mark.parametrize(
    ("kind", "operator"),
    [("plugin", ("tdm", "joint_attention")), ("standard", ("", "Attention")), ("decomposed", ("", "Softmax"))],
)
def test_attention_is_what_was_asked_for(
    parts: dict[str, Part], tmp_path: Path, kind: str, operator: tuple[str, str]
) -> None:
    """In the refiner, the smallest graph with attention: one layer of it."""
    part = parts["refiner"]
    [path] = onnx_format.write(part, tmp_path, kind, body=True)
    found = operators(path)
    others = {("tdm", "joint_attention"), ("", "Attention"), ("", "Softmax")} - {operator}
    assert found[operator] == 1
    assert not any(found[other] for other in others)
    for ours in (in_runtime(path, part), ReferenceEvaluator(onnx.load(path)).run(None, feeds(part))[0]):
        np.testing.assert_allclose(ours, expected(part), rtol=1e-4, atol=1e-5)


def test_without_its_body_the_plugins_node_stands_alone(parts: dict[str, Part], tmp_path: Path) -> None:
    [path] = onnx_format.write(parts["refiner"], tmp_path, "plugin", body=False)
    model = onnx.load(path)
    assert not model.functions
    assert {entry.domain: entry.version for entry in model.opset_import}["tdm"] == 1
    with pytest.raises(Exception, match="joint_attention"):
        opened(path)


def test_large_weights_lie_beside_the_graph(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_format, "EXTERNAL_BYTES", 0)
    part = parts["refiner"]
    files = onnx_format.write(part, tmp_path, "plugin", body=True)
    assert [path.name for path in files] == ["refiner.onnx", "refiner.onnx.data"]
    assert files[1].stat().st_size > files[0].stat().st_size / 10
    np.testing.assert_allclose(in_runtime(files[0], part), expected(part), rtol=1e-4, atol=1e-5)


def test_sizes_are_open(parts: dict[str, Part], tmp_path: Path) -> None:
    """The decoder was traced with other pictures than these."""
    part = parts["decoder"]
    [path] = onnx_format.write(part, tmp_path, "standard", body=True)
    session = opened(path)
    for shape in ((1, 4, 16, 16), (3, 4, 8, 12), (2, 4, 2, 16)):
        latents = torch.randn(shape)
        with torch.no_grad():
            pixels = part.module(latents).numpy()
        np.testing.assert_allclose(session.run(None, {"latents": latents.numpy()})[0], pixels, rtol=1e-3, atol=1e-4)


def test_int8_linears(parts: dict[str, Part], tmp_path: Path) -> None:
    """Integer products, a smaller file, and near the float ones."""
    part = parts["text_encoder"]
    [path] = onnx_format.write(part, tmp_path, "standard", body=True)
    whole, size = in_runtime(path, part), path.stat().st_size
    int8.quantise(path)
    assert operators(path)["", "MatMulInteger"] > 3
    assert path.stat().st_size < size
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    away = np.abs(in_runtime(path, part) - whole)
    assert 0 < away.max() < 0.2 * np.abs(whole).max()
