"""The house: which folders hold which packages, and that the public names are there."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

OUTER = ("app", "exporters", "finetune", "kernels")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.mark.parametrize("folder", OUTER)
def test_outer_folders_hold_packages_and_no_modules(root: Path, folder: str) -> None:
    assert not list((root / folder).glob("*.py"))  # kernels/__init__.py would hide Hugging Face's `kernels`
    packages = [path.parent.name for path in (root / folder).glob("*/__init__.py")]
    assert packages == [f"tdm_{folder}"]


def test_packages_of_the_wheel_exist(root: Path, project: dict[str, Any]) -> None:
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert len(packages) == 5
    for package in packages:
        assert (root / package / "__init__.py").is_file()


def test_every_package_folder_has_an_init(root: Path, project: dict[str, Any]) -> None:
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        for module in (root / package).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module


def test_public_names_are_sorted_and_resolve() -> None:
    import tdm_serve

    assert list(tdm_serve.__all__) == sorted(tdm_serve.__all__)
    for name in tdm_serve.__all__:
        assert getattr(tdm_serve, name) is not None


def test_all_holds_what_installs_without_a_gpu(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    names = {"demo", "finetune", "kernels", "onnx", "serve", "tracing"}
    assert extras["all"] == [f"tdm-serve[{','.join(sorted(names))}]"]
    assert set(extras) == names | {"all", "fp8", "onnx-gpu", "tensorrt", "tensorrt-rtx", "test"}


def test_every_direct_dependency_is_constrained(root: Path, project: dict[str, Any]) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {_normal(line.partition("==")[0]) for line in lines}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in pinned)
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + [
        requirement
        for extra in ("serve", "demo", "finetune", "kernels", "onnx", "test")
        for requirement in extras[extra]
    ]
    names = {_normal(re.split(r"[\[<>=; ]", requirement)[0]) for requirement in wanted} - {"tdm-serve"}
    assert names <= pinned


@pytest.mark.slow
def test_wheel_has_top_level_packages_and_the_checkpoint(root: Path, tmp_path: Path) -> None:
    from build import ProjectBuilder

    wheel = ProjectBuilder(root).build("wheel", tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"tdm_app", "tdm_exporters", "tdm_finetune", "tdm_kernels", "tdm_serve"}
    assert any(name.startswith("tdm_serve/checkpoints/") and name.endswith(".safetensors") for name in names)
    assert not any(name.endswith((".pt", ".pth", ".bin", ".pkl")) for name in names)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
