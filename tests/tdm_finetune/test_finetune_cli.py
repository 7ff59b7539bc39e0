"""`tdm-serve finetune`: shipped configs by name, and dry runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from tdm_finetune.choices import Choices, picture_size, process
from tdm_finetune.cli import PRESETS, STAGES, load, preset
from tdm_finetune.tdm import TdmConfig
from tdm_finetune.tdm_r1 import TdmR1Config
from tdm_serve.cli.main import main
from tdm_serve.config import read_toml
from tdm_serve.errors import ConfigError
from tdm_serve.models.entries import catalogue


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which is told that there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


SHIPPED = sorted(PRESETS.glob("*/*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[f"{path.parent.name}/{path.stem}" for path in SHIPPED])
def test_every_shipped_config_is_one(path: Path) -> None:
    kind = load(STAGES[path.parent.name].config)
    kind(**read_toml(kind, path))


def test_the_official_settings_are_shipped_by_name() -> None:
    found = {path.stem for path in SHIPPED if path.parent.name == "tdm-r1"}
    assert found >= {"geneval", "hpsv2", "imagereward", "ocr", "scenes", "scenes-ocr", "zimage"}
    assert preset("tdm-r1", Path("geneval")) == PRESETS / "tdm-r1" / "geneval.toml"


def test_a_file_wins_over_a_shipped_config_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenes").write_text("steps = 3\n")
    assert preset("tdm", Path("scenes")) == Path("scenes")


def test_an_unknown_config_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="'genval' is neither a file nor a shipped config; shipped: geneval, hpsv2"):
        preset("tdm-r1", Path("genval"))


@pytest.mark.parametrize("stage", ["tdm", "tdm-r1"])
def test_a_dry_run_tells_the_cost_and_writes_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--batch", "2"] if stage == "tdm" else ["--groups", "1", "--group", "2"]
    assert main(["finetune", stage, "--dry-run", "--steps", "1", *sizes]) == 0
    told = capsys.readouterr().out
    # a picture: 4 rollout, 1 fake, 1 generator, 3 teacher and fake; TDM-R1: 3 surrogate, 3 for its direction
    nfe = 2 * 9 if stage == "tdm" else 2 * 15
    assert f"NFE an update  {nfe} " in told
    assert "3.25 M in the base" in told and "memory" in told and "minutes for 1" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "name", "repository"),
    [
        ("tdm-r1", "ocr", "stabilityai/stable-diffusion-3.5-medium"),
        ("tdm-r1", "geneval", "stabilityai/stable-diffusion-3.5-medium"),
        ("tdm-r1", "imagereward", "stabilityai/stable-diffusion-3.5-medium"),
        ("tdm-r1", "hpsv2", "stabilityai/stable-diffusion-3.5-medium"),
        ("tdm-r1", "zimage", "Tongyi-MAI/Z-Image-Turbo"),
        ("tdm", "pixart", "PixArt-alpha/PixArt-XL-2-512x512"),
    ],
)
def test_a_dry_run_without_the_weights_says_which_are_missing(
    stage: str, name: str, repository: str, tmp_path: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = ["--reward", "jpeg"] if stage == "tdm-r1" else []  # others have weights of their own, and say so first
    assert main(["finetune", stage, "--config", name, "--dry-run", "--run", str(tmp_path / "run"), *reward]) == 2
    told = capsys.readouterr().err
    assert f"hub:{repository}@" in told and f"not whole, in the cache {offline}" in told and "base=" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.parent.name in ("tdm", "tdm-r1")])
def test_shipped_configs_name_models_of_the_catalogue(path: Path) -> None:
    kind = load(STAGES[path.parent.name].config)
    checkpoint = kind(**read_toml(kind, path)).checkpoint
    assert checkpoint in catalogue() or checkpoint.startswith("runs/")  # what an earlier stage wrote


def test_the_official_sizes_fit_their_checkpoints(tmp_path: Path) -> None:
    """SD3.5 has another shift at the size of the official runs; the student of PixArt starts at another step."""
    for name, levels in (("ocr", (1.0, 0.9, 0.75, 0.5, 0.0)), ("zimage", (1.0, 0.9, 0.75, 0.5, 0.0))):
        config = TdmR1Config(**read_toml(TdmR1Config, PRESETS / "tdm-r1" / f"{name}.toml"))
        spec = catalogue()[config.checkpoint].spec(tmp_path)
        chosen = Choices(config.size, config.shift, config.top)
        assert picture_size(spec, chosen) == (512, 512)
        assert process(spec, chosen).levels(4) == pytest.approx(levels)
    config = TdmConfig(**read_toml(TdmConfig, PRESETS / "tdm" / "pixart.toml"))
    spec = catalogue()[config.checkpoint].spec(tmp_path)
    assert process(spec, Choices(config.size, config.shift, config.top)).levels(4) == (900, 675, 450, 225, 0)
