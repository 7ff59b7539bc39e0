"""Both trainers on a checkpoint of every family, and what they train as it is served."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import KINDS, checkpoint

from tdm_finetune.choices import Choices
from tdm_finetune.clock import PREFIX
from tdm_finetune.families import load_trainee
from tdm_finetune.paint import Network, paint
from tdm_finetune.replay import Replay
from tdm_finetune.roles import ADAPTER_FILE, Roles
from tdm_finetune.run import Run
from tdm_finetune.student import Student
from tdm_finetune.tdm import Distillation, TdmConfig
from tdm_finetune.tdm_r1 import TdmR1Config
from tdm_finetune.trainee import Trainee
from tdm_finetune.workers import Workers
from tdm_serve import Pipeline
from tdm_serve.cli.main import main
from tdm_serve.errors import ConfigError
from tdm_serve.models.lora import Delta, Lora, read_base, read_lora, write_lora
from tdm_serve.models.spec import MANIFEST

PROMPTS = ("a red star", "b", "9 red stars", "the star, a red one")
SHORT = {"steps": 3, "decay_steps": 1, "warmup": 1, "rank": 4, "alpha": 8.0, "score_prompts": 2, "save_every": 1}
FAST = {"generator_rate": 3e-3, "fake_rate": 3e-3}  # so that three updates are seen in a picture
R1 = {"groups": 2, "group": 3, "reward": "jpeg", "fake_warmup": 0, "surrogate_rate": 3e-3}
CPU, PLAIN = torch.device("cpu"), Choices()
FEW = ("sd35", "pixart")  # one of each process; the others are for `make slow`

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*requires torchvision.*"),
    pytest.mark.filterwarnings("ignore:.*steps_offset.*:FutureWarning"),
]


@pytest.fixture(
    scope="module", params=[kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(kind, tmp_path_factory.mktemp(kind) / "folder")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def flags(values: Mapping[str, Any]) -> list[str]:
    pairs = ((f"--{key.replace('_', '-')}", value) for key, value in values.items())
    return [part for name, value in pairs for part in ((name,) if value is True else (name, str(value)))]


def finetune(stage: str, **values: Any) -> int:
    return main(["finetune", stage, *flags(values)])


@pytest.fixture(scope="module")
def runs(folder: Path, prompts: Path) -> dict[str, Path]:
    """Three updates of both commands: TDM on the base, then TDM-R1 on what came out."""
    made, common = folder.parent, {"prompts": prompts, **SHORT, **FAST}
    assert finetune("tdm", checkpoint=folder, batch=4, run=made / "tdm", **common) == 0
    assert finetune("assemble", base=folder, tdm=made / "tdm", output=made / "distilled") == 0
    assert finetune("tdm-r1", checkpoint=made / "distilled", run=made / "tdm-r1", **common, **R1) == 0
    both = {"tdm": made / "tdm", "tdm_r1": made / "tdm-r1"}
    assert finetune("assemble", base=folder, output=made / "out", **both) == 0
    return {"tdm": made / "tdm", "tdm-r1": made / "tdm-r1", "out": made / "out"}


def drawn(trainee: Trainee, network: Network, nfe: int, guidance: float = 1.0) -> np.ndarray[Any, Any]:
    """A trainee's picture of the first prompt at seed 0, before it is served."""
    return paint(trainee, network, PROMPTS[:1], nfe=nfe, guidance=guidance)[0].numpy().astype(int)


def served(reference: str) -> np.ndarray[Any, Any]:
    [result] = Pipeline.from_pretrained(reference, device="cpu")(PROMPTS[0], seed=0)
    return np.asarray(result.image).astype(int)


def test_the_teacher_is_the_base_as_it_is_served(kind: str, folder: Path) -> None:
    """Text, the empty prompt of guidance, the process, the network's output and the decoder are the serving side's."""
    trainee = load_trainee(folder, Choices(), CPU)
    theirs = served(str(folder))
    ours = drawn(trainee, Roles(trainee, 0, 1.0).base, 6, KINDS[kind].guidance)
    assert np.abs(ours - theirs).max() <= 1
    assert theirs.std() > 1
    assert np.abs(ours - drawn(trainee, Roles(trainee, 0, 1.0).base, 6)).max() > 1  # guidance does something


@pytest.mark.parametrize("version", ["tdm", "tdm-r1"])
def test_what_was_trained_is_what_is_served(runs: dict[str, Path], version: str) -> None:
    reference = f"{runs['out']}@{version}"
    trainee = load_trainee(reference, Choices(), CPU)
    roles = Roles(trainee, 4, 8.0)
    ours = drawn(trainee, roles.new(torch.Generator(), trainee.adapter), 4)
    assert np.abs(ours - served(reference)).max() <= 1
    assert np.abs(ours - drawn(trainee, roles.base, 4)).max() > 1  # the adapter is at work


def test_three_updates_move_both_commands_generators(runs: dict[str, Path]) -> None:
    files = [load_file(runs[name] / ADAPTER_FILE) for name in ("tdm", "tdm-r1")]
    assert files[0].keys() == files[1].keys()
    still = {key for key in files[0] if torch.equal(files[0][key], files[1][key])}
    assert all("blocks.2.attn.add_q_proj" in key for key in still)  # SD3's last block lets its text go


def test_the_adapter_has_the_familys_own_names(kind: str, folder: Path, runs: dict[str, Path]) -> None:
    base = read_base(folder)
    file = runs["tdm"] / ADAPTER_FILE
    lora = read_lora(file, base)
    assert len(lora.modules) == KINDS[kind].trained
    assert {delta.scale for delta in lora.modules.values()} == {2.0} and not lora.warnings
    assert all(key.startswith(f"{base.component}.") for key in load_file(file))


def test_generate_draws_the_trained_version(runs: dict[str, Path], tmp_path: Path) -> None:
    """The command, on a folder that was moved."""
    moved = runs["out"].rename(tmp_path / "moved")
    try:
        pictures = [tmp_path / f"{name}.png" for name in ("teacher", "tdm-r1")]
        for path in pictures:
            assert main(["generate", PROMPTS[1], "--model", f"{moved}@{path.stem}", *flags({"output": path})]) == 0
        assert pictures[0].read_bytes() != pictures[1].read_bytes()
    finally:
        moved.rename(runs["out"])


def test_rated_pictures_are_made_again(runs: dict[str, Path], tmp_path: Path) -> None:
    """People rate what is served: from prompt and seed the trainer comes to the same pictures."""
    reference = f"{runs['out']}@tdm"
    pipeline = Pipeline.from_pretrained(reference, device="cpu")
    recipe = {"prompt": PROMPTS[0], "checkpoint_hash": pipeline.info.checkpoint_hash, "model": reference}
    shared = recipe | {"size": "64x64", "time": "2026-11-22T10:00:00Z"}
    path = tmp_path / "likes.jsonl"
    path.write_text("".join(json.dumps({"seed": seed, "like": seed == 3, **shared}) + "\n" for seed in (3, 4)))
    config = TdmR1Config(checkpoint=reference, group=2, feedback=path, rank=4, alpha=8.0)
    student = Student(config, load_trainee(reference, PLAIN, CPU), Workers())
    replay = Replay(path, student, 2)
    batch = student.batch(list(islice(replay.prompts(0), 1)), 2, 0, range(1))
    trajectory, ratings = replay.trajectory(batch)
    for picture, rating in zip(student.trainee.decode(trajectory.states[-1]), ratings.tolist(), strict=True):
        [theirs] = pipeline(PROMPTS[0], seed=3 if rating > 0 else 4)
        assert np.abs(np.asarray(theirs.image).astype(int) - picture.numpy().astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tdm", "tdm-r1"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    values = {"checkpoint": folder, "prompts": prompts, **SHORT, **(R1 if stage == "tdm-r1" else {"batch": 4})}
    assert finetune(stage, run=tmp_path / "whole", **values) == 0
    advance = Run.advance

    def interrupted(self: Run, scalars: Mapping[str, float]) -> None:
        if self.step == 1:
            raise InterruptedError
        advance(self, scalars)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "advance", interrupted)
        with pytest.raises(InterruptedError):
            finetune(stage, run=tmp_path / "cut", **values)
    assert finetune(stage, run=tmp_path / "cut", **values) == 0
    one, two = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def student_of(folder: Path, prompts: Path, choices: Choices = PLAIN, **values: Any) -> Distillation:
    config = TdmConfig(**{**SHORT, "checkpoint": str(folder), "prompts": prompts, "batch": 4, **values})
    return Distillation(config, Student(config, load_trainee(folder, choices, CPU), Workers()))


def updated(trainer: Distillation, updates: int = 2) -> dict[str, float]:
    """The last update's scalars without its times."""
    chosen = list(islice(trainer.prompts(0), 4))
    found = [trainer.update(chosen, range(4), step) for step in range(updates)][-1]
    return {name: value for name, value in found.items() if not name.startswith(PREFIX)}


def test_recomputed_activations_change_no_gradient(folder: Path, prompts: Path) -> None:
    """Blocks are called with named arguments by diffusers' networks, and run again with the role of the first time."""
    found: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        trainer = student_of(folder, prompts, checkpointing=recompute, precision="fp32")
        updated(trainer)
        found.append([parameter.detach().clone() for parameter in trainer.student.generator.parameters])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)


def test_a_frozen_network_held_in_half_trains_as_in_whole(folder: Path, prompts: Path) -> None:
    """As on a GPU, where it saves half of the base's memory; products are in bfloat16 either way."""
    whole, half = student_of(folder, prompts), student_of(folder, prompts, Choices(held=torch.bfloat16))
    assert {p.dtype for p in half.student.trainee.net.parameters()} == {torch.bfloat16}
    one, two = updated(whole), updated(half)
    assert one.keys() == two.keys() and all(math.isfinite(value) for value in two.values())
    for name in ("fake_loss", "generator_kl", "generator_guidance"):
        assert two[name] == pytest.approx(one[name], rel=0.15), name


def _first_encoder(family: Any) -> Any:
    return family.clips[0] if hasattr(family, "clips") else family.text_encoder


def test_a_prompt_is_encoded_once(folder: Path) -> None:
    trainee = load_trainee(folder, Choices(), CPU)
    first = trainee.encode(["a red star", ""])
    parts: Any = trainee
    encoder = parts.frozen.encoder if hasattr(parts, "frozen") else _first_encoder(parts.family)
    calls: list[int] = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    again = trainee.encode(["", "a red star"])
    assert not calls
    assert all(torch.equal(one, two.flip(0)) for one, two in zip(first, again, strict=True))
    trainee.encode(["b"])
    assert calls


def test_an_endless_prompt_is_refused_before_there_is_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a red star\n" + "9 " * 80)
    assert finetune("tdm", checkpoint=folder, prompts=path, batch=2, run=tmp_path / "run", **SHORT) != 0
    told = capsys.readouterr().err
    assert f"prompts {path}: '9 9 9" in told and "cannot be used" in told and "tokens" in told
    assert not (tmp_path / "run").exists()
    cut = {"checkpoint": folder, "prompts": path, "batch": 2, "truncate_prompts": True, **SHORT}
    assert finetune("tdm", run=tmp_path / "run", **cut) == 0


def test_without_a_world_prompts_must_be_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("tdm", checkpoint=folder, batch=2, run=tmp_path / "run", **SHORT) != 0
    assert "has no world of its own to take prompts from; give a file with --prompts" in capsys.readouterr().err


def test_without_a_world_a_reward_must_be_named(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"checkpoint": folder, "prompts": prompts, "groups": 1, "group": 2, "run": tmp_path / "run", **SHORT}
    assert finetune("tdm-r1", **values) == 2
    assert "has no world whose checker could reward it; name one with --reward" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


CHOICES = [
    (Choices(size=40), r"size is 40; .* draws sides from 32 to 192 pixels, in steps of 16"),
    (Choices(size=256), r"size is 256; .* draws sides from 32 to 192"),
    (Choices(targets=("to_x",)), r"targets to_x name no linear layer of \w+"),
]


@pytest.mark.parametrize(("choices", "message"), CHOICES)
def test_choices_that_do_not_fit(folder: Path, choices: Choices, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_trainee(folder, choices, CPU)


def test_choices_of_the_other_process(kind: str, folder: Path) -> None:
    if KINDS[kind].process:
        wrong, message = Choices(shift=3.0), "a variance-preserving process; set top instead"
    else:
        wrong, message = Choices(top=900), "a flow-matching model; set shift instead"
    with pytest.raises(ConfigError, match=message):
        load_trainee(folder, wrong, CPU)


def test_choices_are_taken(kind: str, folder: Path) -> None:
    flow = not KINDS[kind].process
    chosen = Choices(size=32, targets=("to_q",), **({"shift": 6.0} if flow else {"top": 600}))
    trainee = load_trainee(folder, chosen, CPU)
    assert trainee.picture_size == (32, 32) and trainee.latent_shape[1:] == (4, 4)
    assert {name.rpartition(".")[2] for name in trainee.linears()} == {"to_q"}
    assert trainee.process.levels(4)[:2] == pytest.approx((1.0, 18 / 19) if flow else (600.0, 450.0))


def named_lora(folder: Path, names: Sequence[str], scale: float) -> Lora:
    """A LoRA of rank 4 on modules of a folder's network, convolutions too."""
    layers, random = read_base(folder).layers, torch.Generator().manual_seed(2)

    def made(shape: tuple[int, ...]) -> Delta:
        a = torch.randn(4, *shape[1:], generator=random)
        b = torch.randn(shape[0], 4, *[1] * (len(shape) - 2), generator=random)
        return Delta(0.3 * a, 0.3 * b, scale)

    return Lora({name: made(layers[name]) for name in names}, "made")


def with_adapter(folder: Path, lora: Lora, tmp_path: Path) -> str:
    """A reference to the folder with an adapter, at half of its strength."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    write_lora(lora, copy / "lora.safetensors", read_base(folder).component)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["versions"]["teacher"]["adapter"] = {"path": "lora.safetensors", "scale": 0.5}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return str(copy)


def test_training_goes_on_from_an_adapter_as_strong_as_its_version_says(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """Its modules are those that are trained; alpha / rank and the version's scale are kept."""
    names = [name for name in read_base(folder).layers if name.endswith((".to_q", ".to_v"))]
    reference, guidance = with_adapter(folder, named_lora(folder, names, 1.5), tmp_path), KINDS[kind].guidance
    trainee = load_trainee(reference, Choices(), CPU)
    assert list(trainee.linears()) == names
    roles = Roles(trainee, 4, 8.0)
    ours = drawn(trainee, roles.new(torch.Generator(), trainee.adapter), 6, guidance)
    assert np.abs(ours - served(reference)).max() <= 1
    assert np.abs(ours - drawn(trainee, roles.base, 6, guidance)).max() > 1


def test_an_adapter_on_convolutions_is_refused(tmp_path: Path) -> None:
    folder = checkpoint("sd15", tmp_path / "sd15")
    reference = with_adapter(folder, named_lora(folder, ["down_blocks.0.resnets.0.conv1"], 1.0), tmp_path)
    with pytest.raises(
        ConfigError, match=r"changes the convolution down_blocks.*conv1; only linear layers are trained"
    ):
        load_trainee(reference, Choices(), CPU)


@pytest.mark.slow
def test_two_processes_that_share_the_base_train_as_one(
    folder: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The command under torchrun: each block's weights are spread, whatever a family's network calls where."""
    common = {"checkpoint": folder, "prompts": prompts, "batch": 4, "precision": "fp32", **SHORT}
    assert finetune("tdm", run=tmp_path / "one", **common) == 0
    config = tmp_path / "config.toml"  # torchrun takes --run for an option of its own
    config.write_text(f'run = "{tmp_path / "two"}"')
    arguments = ["finetune", "tdm", *flags({**common, "shard": True, "checkpointing": True, "config": config})]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launch, "tdm_serve.cli", *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
    for name in ("fake_loss", "generator_kl", "generator_guidance"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=2e-4), name
