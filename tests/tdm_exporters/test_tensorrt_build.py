"""TensorRT's builder, which cannot run here: every name that it uses exists, and what it says where it cannot build."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tdm_exporters.network import Span
from tdm_exporters.tensorrt_build import Place, Target, build, cache_name
from tdm_exporters.tensorrt_library import bindings, driver_version
from tdm_serve.errors import BackendUnavailable, MissingExtra

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "exporters" / "tdm_exporters"
PLACE = Place("NVIDIA H200", 90, 13000, "11.4.0.106")
TARGET = Target({"sigma": Span((1,), (2,), (4,))})

WRONG = {
    "config.set_flg(trt.BuilderFlag.REFIT_INDIVIDUAL)": "IBuilderConfig has no set_flg",
    "config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUALLY)": "BuilderFlag has no REFIT_INDIVIDUALLY",
    "config.set_timing_cache(b'')": "set_timing_cache takes [(2, 2)], and gets 1",
    "network.get_layer(0).typ": "ILayer has no typ",
    "builder.build_serialized_network(network)": "build_serialized_network takes [(2, 2), (3, 3)], and gets 1",
    "trtp.KernelLaunchParameters()": "has no KernelLaunchParameters",
}


def test_every_name_and_call_is_in_nvidia_s_bindings(with_stubs: Callable[..., Any], tmp_path: Path) -> None:
    sources = [str(SOURCES / name) for name in ("network.py", "tensorrt_build.py", "tensorrt_plugin.py")]
    found = with_stubs(HERE / "tensorrt_members.py", *sources)
    assert found["wrong"] == []
    assert all(uses >= 25 for uses in found["uses"].values()), found["uses"]
    typos = tmp_path / "typos.py"
    typos.write_text("\n".join(WRONG))
    found = with_stubs(HERE / "tensorrt_members.py", str(typos))
    for line, said in enumerate(WRONG.values(), 1):
        assert any(one.startswith(f"typos.py:{line}: ") and one.endswith(said) for one in found["wrong"]), said


def test_an_engine_is_found_again_only_where_it_runs_and_does_the_same() -> None:
    name = cache_name("c0ffee", "denoiser", TARGET, PLACE)
    assert name == cache_name("c0ffee", "denoiser", replace(TARGET, timings=Path("other")), replace(PLACE))
    others = [
        cache_name("decaf", "denoiser", TARGET, PLACE),
        cache_name("c0ffee", "decoder", TARGET, PLACE),
        cache_name("c0ffee", "denoiser", replace(TARGET, refit=("weight",)), PLACE),
        cache_name("c0ffee", "denoiser", Target({"sigma": Span((1,), (2,), (8,))}), PLACE),
        cache_name("c0ffee", "denoiser", TARGET, replace(PLACE, gpu="NVIDIA H100")),
        cache_name("c0ffee", "denoiser", TARGET, replace(PLACE, capability=89)),
        cache_name("c0ffee", "denoiser", TARGET, replace(PLACE, driver=12080)),
        cache_name("c0ffee", "denoiser", TARGET, replace(PLACE, tensorrt="11.5.0")),
    ]
    assert len({name, *others}) == 9
    assert name.startswith("denoiser-")
    assert name.endswith(".engine")


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    bindings.cache_clear()
    with pytest.raises(MissingExtra, match=r"--format tensorrt needs .*; run: pip install 'tdm-serve\[tensorrt\]'"):
        build(tmp_path / "denoiser.onnx", tmp_path / "engine", TARGET)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_driver() -> None:
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver is installed here: libcuda"):
        driver_version()
