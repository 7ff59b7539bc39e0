"""The trainers through the real command line, tiny: they learn, they resume bit for bit, their output is served.

What TDM and TDM-R1 do inside is tested on a toy: test_student.py, test_tdm_trainer.py and those beside them.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tdm_finetune.micro.trainee import MicroSettings, MicroTrainee
from tdm_serve import Pipeline
from tdm_serve.cli.main import main
from tdm_serve.models.catalog import EMBEDDED

Cli = Callable[..., CompletedProcess[str]]

TINY = {
    "vae": "--steps 6 --batch 4 --crop 32 --save-every 3 --block-channels 16,16,16,16",
    "text": "--steps 12 --batch 16 --save-every 6 --width 32 --vocabulary 400",
    "pretrain": "--steps 6 --decay-steps 2 --batch 8 --scenes 16 --width 48 --heads 2 --layers 1 --save-every 3 "
    "--score-every 6",
    "tdm": "--steps 4 --decay-steps 2 --batch 4 --rank 4 --save-every 2 --score-every 4 --score-prompts 5",
    "tdm-r1": "--steps 4 --decay-steps 2 --groups 2 --group 4 --rank 4 --save-every 2 --score-every 4 "
    "--score-prompts 5 --fake-warmup 1 --reward scenes:1.0,jpeg:0.1",
}


def finetune(cli: Cli, stage: str, cwd: Path, *more: str) -> None:
    done = cli("finetune", stage, *TINY.get(stage, "").split(), *more, cwd=cwd, timeout_s=240)
    assert done.returncode == 0, done.stderr


def log(folder: Path) -> list[dict[str, Any]]:
    """Logged scalars without the clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "elapsed_s"} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_nothing_to_a_served_four_step_checkpoint(cli: Cli, tmp_path: Path) -> None:
    """Every stage with its defaults' folder names, as docs/training.md lists them."""
    for stage in ("vae", "text", "pretrain"):
        finetune(cli, stage, tmp_path)
    finetune(cli, "assemble", tmp_path, "--output", "runs/base")
    finetune(cli, "tdm", tmp_path, "--checkpoint", "runs/base")
    finetune(cli, "assemble", tmp_path, "--output", "runs/distilled", "--tdm", "runs/tdm")
    finetune(cli, "tdm-r1", tmp_path, "--checkpoint", "runs/distilled")
    both = ["--tdm", "runs/tdm", "--tdm-r1", "runs/tdm-r1"]
    finetune(cli, "assemble", tmp_path, "--output", "runs/checkpoint", *both)
    checkpoint = tmp_path / "runs" / "checkpoint"
    four, distilled = Pipeline.from_pretrained(checkpoint), Pipeline.from_pretrained(f"{checkpoint}@tdm")
    pictures = [version("a red star", seed=1)[0] for version in (four, distilled)]
    assert [picture.nfe for picture in pictures] == [4, 4]
    assert Pipeline.from_pretrained(f"{checkpoint}@teacher").info.nfe == 50
    first, second = (load_file(checkpoint / "adapters" / f"{name}.safetensors") for name in ("tdm", "tdm-r1"))
    assert first.keys() == second.keys() and not all(torch.equal(first[name], second[name]) for name in first)
    for stage in ("vae", "text", "pretrain", "tdm", "tdm-r1"):
        assert json.loads((checkpoint / "training" / stage / "config.json").read_text())["machine"]["versions"]["torch"]
        assert log(checkpoint / "training" / stage)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint's frozen parts where the trainers look for them."""
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(EMBEDDED / "vae", folder / "runs" / "vae" / "vae")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(EMBEDDED / name, folder / "runs" / "text" / name)
    return folder


# kills the process right after its first save, which no signal from outside could time
KILLED_AFTER_SAVE = """
import os, signal, sys
from tdm_finetune import run
save = run.Run.save
def save_and_die(self, **state):
    save(self, **state)
    os.kill(os.getpid(), signal.SIGKILL)
run.Run.save = save_and_die
from tdm_serve.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("stage", "source"),
    [("pretrain", []), ("tdm", ["--checkpoint", "default-teacher"])],
)
@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(
    cli: Cli, environment: dict[str, str], parts: Path, tmp_path: Path, stage: str, source: list[str]
) -> None:
    """Killed with -9 and resumed, a run ends with the weights of one that was never stopped."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finetune(cli, stage, parts, "--run", str(whole), *source)
    command = [sys.executable, "-c", KILLED_AFTER_SAVE, "finetune", stage, *TINY[stage].split(), "--run", str(killed)]
    died = subprocess.run([*command, *source], cwd=parts, env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert 0 < torch.load(killed / "state.pt", weights_only=True)["step"] < log(whole)[-1]["step"]
    finetune(cli, stage, parts, "--run", str(killed), *source)
    outputs = [path for path in whole.rglob("*.safetensors") if "cache" not in path.parts]
    assert outputs
    for path in outputs:
        resumed = load_file(killed / path.relative_to(whole))
        assert all(torch.equal(value, resumed[name]) for name, value in load_file(path).items())
    assert log(killed)[-1] == log(whole)[-1]


@pytest.mark.slow
def test_resuming_with_another_config_shows_the_difference(cli: Cli, parts: Path, tmp_path: Path) -> None:
    finetune(cli, "text", parts, "--run", str(tmp_path / "run"))
    done = cli("finetune", "text", *TINY["text"].split(), "--seed", "5", "--run", str(tmp_path / "run"), cwd=parts)
    assert done.returncode == 2
    assert "seed: 0 -> 5" in done.stderr


@pytest.mark.slow
def test_pretraining_lowers_its_loss(parts: Path, cli: Cli, tmp_path: Path) -> None:
    finetune(
        cli, "pretrain", parts, "--run", str(tmp_path / "run"), "--steps", "60", "--score-every", "60", "--batch", "16"
    )
    losses = [row["loss"] for row in log(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_pretraining_goes_on_from_a_finished_run(cli: Cli, parts: Path, tmp_path: Path) -> None:
    """With rates of next to nothing the second leg ends where the first did; another architecture is refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    finetune(cli, "pretrain", parts, "--run", str(first))
    still = ["--learning-rate", "1e-12", "--muon-learning-rate", "1e-12", "--start", str(first)]
    finetune(cli, "pretrain", parts, "--run", str(second), *still)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(first / weights), load_file(second / weights)
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items())
    wider = ["--run", str(tmp_path / "third"), "--width", "96", "--start", str(first)]
    done = cli("finetune", "pretrain", *TINY["pretrain"].split(), *wider, cwd=parts)
    assert done.returncode == 2
    assert "holds another architecture (dim: " in done.stderr


def test_the_micro_world_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network behind the same interface: distilled, then reinforced from there, with full weights, too."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    settings = MicroSettings(width=16, layers=1, heads=2)
    MicroTrainee(settings, settings.build()).save(Path("micro"))
    shared = [
        "--checkpoint",
        "micro",
        "--steps",
        "2",
        "--decay-steps",
        "1",
        "--rank",
        "2",
        "--precision",
        "fp32",
        "--score-prompts",
        "3",
    ]
    reward = ["--reward", "jpeg", "--groups", "2", "--group", "2", "--score-every", "1"]
    for arguments in (
        ["tdm", "--run", "tdm", "--batch", "4", *shared],
        ["tdm-r1", "--run", "r1", "--start", "tdm", *reward, *shared],
        ["tdm-r1", "--run", "full", *reward, *shared, "--rank", "0", "--fake-warmup", "0"],
    ):
        assert main(["finetune", *arguments]) == 0
    assert {"strict", "soft", "diversity"} <= {name.removeprefix("val_") for name in log(Path("r1"))[-1]}
    first, second = (load_file(Path(run) / "adapter.safetensors") for run in ("tdm", "r1"))
    assert first.keys() == second.keys()
    assert MicroTrainee.load(Path("full/full")).settings == settings
