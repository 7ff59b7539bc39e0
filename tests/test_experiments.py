"""The experiments' files: every table is a config of its stage, and what it goes on from exists."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tdm_finetune.tdm_r1 import TdmR1Config
from tdm_serve.errors import ConfigError


@pytest.fixture(scope="module")
def experiments(root: Path) -> Iterator[ModuleType]:
    """The script as a module; its folder is on the path while it is imported, as when it is run."""
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("experiments", root / "benchmarks" / "experiments.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(root / "benchmarks"))


def worlds(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "benchmarks" / "experiments").glob("*.toml"))


def test_every_table_is_a_config_of_its_stage(experiments: ModuleType, root: Path, tmp_path: Path) -> None:
    found = worlds(root)
    assert "micro" in found
    for name in found:
        world, methods = experiments.read(name)
        for method in methods.values():
            if method.stage != experiments.SAMPLE:
                config = experiments.config_of(method, world, tmp_path, 3)
                assert config.seed == 3 and config.run == tmp_path / f"{method.key}-3"


def test_the_micro_world_has_all_methods_of_the_story(experiments: ModuleType, tmp_path: Path) -> None:
    world, methods = experiments.read("micro")
    assert {method.name for method in methods.values()} >= {
        "teacher",
        "tdm",
        "tdm-r1",
        "direct",
        "no-kl",
        "final-step-only",
        "stochastic",
        "frozen-surrogate",
        "ema-reference",
    }
    reference = experiments.config_of(methods["tdm-r1"], world, tmp_path, 0)
    no_kl = experiments.config_of(methods["no-kl"], world, tmp_path, 0)
    assert isinstance(no_kl, TdmR1Config) and no_kl.kl_weight == 0 and reference.kl_weight == 1
    assert no_kl.start == tmp_path / "tdm-0" and no_kl.groups == reference.groups
    frozen = experiments.config_of(methods["frozen-surrogate"], world, tmp_path, 0)
    assert frozen.surrogate == tmp_path / "surrogate-only-0" and frozen.surrogate_rate == 0


def test_an_unknown_world_lists_the_known(experiments: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"world 'macro' is unknown; known: .*micro"):
        experiments.read("macro")


def test_levers_are_run_for_their_seeds_only(experiments: ModuleType) -> None:
    _, methods = experiments.read("micro")
    assert methods["lever-drift"].seeds == (0,) and methods["lever-drift"].name == "tdm-r1"
    assert methods["tdm-r1"].seeds == ()


def test_a_table_takes_a_shipped_config(experiments: ModuleType, tmp_path: Path) -> None:
    world, methods = experiments.read("scenes")
    config = experiments.config_of(methods["ocr"], world, tmp_path, 0)
    assert isinstance(config, TdmR1Config) and config.reward == "ocr" and config.categories == ("text",)
    assert methods["ocr"].name == "tdm-r1" and config.run == tmp_path / "ocr-0"
