"""`tdm-serve finetune`: shipped configs by name, and dry runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdm_finetune.cli import PRESETS, STAGES, load, preset
from tdm_serve.cli.main import main
from tdm_serve.config import read_toml
from tdm_serve.errors import ConfigError

SHIPPED = sorted(PRESETS.glob("*/*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[f"{path.parent.name}/{path.stem}" for path in SHIPPED])
def test_every_shipped_config_is_one(path: Path) -> None:
    kind = load(STAGES[path.parent.name].config)
    kind(**read_toml(kind, path))


def test_the_official_settings_are_shipped_by_name() -> None:
    found = {path.stem for path in SHIPPED if path.parent.name == "tdm-r1"}
    assert found == {"geneval", "hpsv2", "imagereward", "ocr", "scenes", "scenes-ocr", "zimage"}
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
