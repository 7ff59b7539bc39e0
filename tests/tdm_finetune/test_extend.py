"""A base of any kind with what runs trained on it: what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import checkpoint

from tdm_finetune.assemble import AssembleConfig, assemble
from tdm_serve import Pipeline
from tdm_serve.cli.main import main
from tdm_serve.errors import CheckpointError, ConfigError, UnknownModel
from tdm_serve.models.catalog import resolve
from tdm_serve.models.spec import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")

SHORT = {"steps": 1, "decay-steps": 1, "warmup": 1, "score-prompts": 1, "batch": 1, "nfe": 2, "generator-rate": 1e-2}


def trained(folder: Path, run: Path, **values: Any) -> Path:
    """One update of TDM."""
    run.parent.mkdir(parents=True, exist_ok=True)
    (run.parent / "prompts.txt").write_text("a red star")
    given = {"checkpoint": folder, "run": run, "prompts": run.parent / "prompts.txt", **SHORT, **values}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    assert main(["finetune", "tdm", *flags]) == 0
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("pixart", tmp_path_factory.mktemp("base") / "folder")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return trained(folder, folder.parent / "run", rank=2, size=32)


def drawn(reference: str) -> np.ndarray[Any, Any]:
    return np.asarray(Pipeline.from_pretrained(reference, device="cpu")("a red star", seed=0)[0].image)


def test_the_versions_of_the_base_stay_as_they_were(folder: Path, run: Path, tmp_path: Path) -> None:
    out = assemble(AssembleConfig(output=tmp_path / "out", base=str(folder), tdm=run))
    assert np.array_equal(drawn(f"{out}@teacher"), drawn(str(folder)))
    again = assemble(AssembleConfig(output=tmp_path / "again", base=str(out), tdm_r1=run))
    assert [*json.loads((again / MANIFEST).read_text())["versions"]] == ["teacher", "tdm", "tdm-r1"]
    assert np.array_equal(drawn(f"{again}@tdm"), drawn(f"{out}@tdm"))
    assert np.array_equal(drawn(str(again)), drawn(f"{again}@tdm"))
    assert (again / "training" / "tdm-r1" / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()


def test_what_was_trained_at_a_size_of_its_own_is_drawn_at_it(folder: Path, run: Path, tmp_path: Path) -> None:
    out = assemble(AssembleConfig(output=tmp_path / "out", base=str(folder), tdm=run))
    assert drawn(str(out)).shape == (32, 32, 3) and drawn(f"{out}@teacher").shape == (64, 64, 3)


def test_students_end_without_noise_whatever_the_bases_scheduler_leaves(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    noisy = Path(shutil.copytree(folder, tmp_path / "noisy"))
    manifest = json.loads((noisy / MANIFEST).read_text())
    manifest["betas"]["final"] = "sigma_min"
    (noisy / MANIFEST).write_text(json.dumps(manifest))
    out = assemble(AssembleConfig(output=tmp_path / "out", base=str(noisy), tdm=run))
    assert [resolve(f"{out}@{name}").betas.final for name in ("teacher", "tdm")] == ["sigma_min", "zero"]
    assert resolve(str(out)).rows()[-1].a == 0.0


def test_all_weights_take_the_networks_place(folder: Path, run: Path, tmp_path: Path) -> None:
    full = trained(folder, tmp_path / "full", rank=0)
    out = assemble(AssembleConfig(output=tmp_path / "out", base=str(folder), tdm=full))
    assert [*json.loads((out / MANIFEST).read_text())["versions"]] == ["tdm"]
    assert resolve(str(out)).adapters == () and len(resolve(str(out)).rows()) == 2
    assert np.abs(drawn(str(out)).astype(int) - drawn(str(folder)).astype(int)).max() > 1
    with pytest.raises(ConfigError, match="run of tdm trained all weights, so nothing can stand beside it"):
        assemble(AssembleConfig(output=tmp_path / "both", base=str(folder), tdm=full, tdm_r1=run))
    assert not (tmp_path / "both").exists()


def test_what_is_missing_is_named(folder: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run was named; give --tdm, --tdm-r1 or both"):
        assemble(AssembleConfig(output=tmp_path / "out", base=str(folder)))
    with pytest.raises(UnknownModel, match="model 'nowhere'"):
        assemble(AssembleConfig(output=tmp_path / "out", base="nowhere", tdm=run))
    with pytest.raises(CheckpointError, match="is missing; `tdm-serve finetune tdm` writes it at its end"):
        assemble(AssembleConfig(output=tmp_path / "out", base=str(folder), tdm=tmp_path))
    assert not (tmp_path / "out").exists()
