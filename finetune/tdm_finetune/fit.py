"""The loop around TDM and TDM-R1: prompts, resume, scores, guard, and what comes out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from tdm_finetune.choices import Choices
from tdm_finetune.learner import EarlyStop, Guard
from tdm_finetune.paint import paint, quick_scores, sheet
from tdm_finetune.process import Flow
from tdm_finetune.prompts import check_prompts
from tdm_finetune.rewards import load_reward
from tdm_finetune.run import VERSION_FILE, Run, as_json, seed_everything
from tdm_finetune.student import Student, StudentConfig
from tdm_finetune.trainee import Prompt, Trainee
from tdm_finetune.workers import Workers
from tdm_serve.errors import OutputError
from tdm_serve.files import write_atomically
from tdm_serve.machine import stamp

logger = logging.getLogger(__name__)

SHEET_COLUMNS = 10
SEEDS = 2  # pictures a validation prompt: as few as show whether they are alike


class Trainer(Protocol):
    """What the loop drives."""

    student: Student
    groups: int  # prompts an update, over all processes
    fake_warmup: int  # first updates that train the fake score only, and cost less than the others

    def prompts(self, seed: int) -> Iterator[Prompt]:
        """Training prompts without end."""
        ...

    def update(self, prompts: Sequence[Prompt], places: Sequence[int], step: int) -> dict[str, float]:
        """One update of all roles with this process's prompts; scalars for the log."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trainee(config: StudentConfig, device: torch.device) -> Trainee:
    """The checkpoint that a config names, as its family's trainee; encoders go to `device`."""
    folder = Path(config.checkpoint)
    if (folder / "micro.json").is_file():
        from tdm_finetune.micro.trainee import MicroTrainee

        return MicroTrainee.load(folder)
    from tdm_finetune.families import load_trainee

    choices = Choices(
        size=config.size,
        shift=config.shift,
        top=config.top,
        targets=config.targets,
        text_tokens=config.text_tokens,
        truncate=config.truncate_prompts,
        held=held(config, device),
    )
    return load_trainee(config.checkpoint, choices, device)


def held(config: StudentConfig, device: torch.device) -> torch.dtype:
    """The type of the frozen network: where matrices are multiplied in bfloat16 on a GPU, it is kept in that."""
    halved = device.type != "cpu" and config.precision == "bf16" and config.rank > 0
    return torch.bfloat16 if halved else torch.float32


def fit(trainer: Trainer, config: StudentConfig, method: str) -> Path:
    """Trains, or resumes, and writes the averaged generator with its table and lineage; returns the run folder.

    With `patience`, the generator is the one that scored best. Raises ConfigError for another config's folder,
    TrainingDiverged, RewardError, or OutputError for a full disk; the last good state stays.
    """
    seed_everything(config.seed)
    student = trainer.student
    workers = student.workers
    check_prompts(student.trainee, config.prompts)  # what is of no use is refused before there is a run folder
    next(trainer.prompts(config.seed + 1))
    run = Run(config.run, config, total_steps=config.steps, every=10, leads=workers.leads, board=True)
    if (state := run.resume()) is not None:
        trainer.load(state)
    guard, early = Guard(), EarlyStop(config.patience)
    if state is not None and "early_stop" in state:
        early.load(state["early_stop"])
    kept = f"{config.run}/state.pt, or the start if it is missing"
    scores: dict[str, float] = {}
    try:
        for prompts in () if early.over else updates(trainer, config, run.step):
            scalars = workers.means(trainer.update(prompts, workers.share(trainer.groups), run.step))
            guard.check(scalars, run.step, kept)
            run.advance(scalars)
            last = run.step == config.steps
            if run.step % config.score_every == 0 or last:
                scores = score(student, run)
                early.see(scores.get("soft", scalars.get("reward", 0.0)), student.average.state_dict())
                last |= early.over
            if last and early.kept is not None:
                student.average.load_state_dict(early.kept)
            if run.step % config.save_every == 0 or last:
                run.save(**trainer.state(), early_stop=early.state())
            if last:
                break
        if not scores:  # killed between its last state and here
            scores = score(student, run)
    finally:
        run.close()
    trainer.close()
    if workers.leads:
        save(student, method, scores)
    return config.run


def updates(trainer: Trainer, config: StudentConfig, done: int) -> Iterator[list[Prompt]]:
    """This process's prompts of every update that is left."""
    share = trainer.student.workers.share(trainer.groups)
    prompts = trainer.prompts(config.seed + 1)
    next(islice(prompts, done * trainer.groups, done * trainer.groups), None)
    for _ in range(config.steps - done):
        yield list(islice(prompts, trainer.groups))[share.start : share.stop]


def score(student: Student, run: Run) -> dict[str, float]:
    """Logs the averaged generator's scores and the health of its pictures on fixed prompts and noise."""
    trainee, config = student.trainee, student.config
    chosen = list(islice(student.prompts("val", 0), config.score_prompts))
    prompts = [prompt for prompt in chosen for _ in range(SEEDS)]
    with student.average.applied(), student.autocast():
        pictures = paint(trainee, student.generator, [prompt.text for prompt in prompts], nfe=config.nfe)
    run.picture("sheet", sheet(pictures[::SEEDS], SHEET_COLUMNS))
    scores = quick_scores(trainee, prompts, pictures, SEEDS)
    if config.watch:
        watched = load_reward(config.watch)
        scores["watched"] = float(watched(pictures, [p.text for p in prompts], [p.metadata for p in prompts]).mean())
    run.log({f"val_{name}": value for name, value in scores.items()})
    logger.info("step %d: %s", run.step, scores)
    return scores


def save(student: Student, method: str, scores: Mapping[str, float]) -> None:
    """The adapter or the folder, and beside it what a checkpoint's manifest says of this version."""
    config, process = student.config, student.process
    rows = process.rows(config.nfe)
    try:
        with student.average.applied():
            student.generator.save(config.run)
    except (OSError, SafetensorError, OutputError) as error:
        raise OutputError(f"cannot write what was trained to {config.run}: {error}; resume to try again") from error
    version = {
        "description": f"{'Reinforced' if method == 'tdm-r1' else 'Distilled'} to {config.nfe} network evaluations "
        f"with {method.upper()}.",
        "sampler": "euler" if isinstance(process, Flow) else "ddim",
        "shift": process.shift if isinstance(process, Flow) else 1.0,
        "sigmas": [row.sigma for row in rows],
        **({} if isinstance(process, Flow) else {"times": [row.t for row in rows]}),
        "guidance": 1.0,
        "lineage": {"method": method, "config": as_json(config), "machine": stamp(), "validation": dict(scores)},
    }
    write_atomically(config.run / VERSION_FILE, (json.dumps(version, indent=1) + "\n").encode())


def make_student(config: StudentConfig) -> Student:
    """The student of a config in this process."""
    seed_everything(config.seed)  # full-weight roles and dropout-free networks draw nothing else
    workers = Workers()
    student = Student(config, open_trainee(config, workers.device), workers)
    if config.shard:
        workers.shard(student.trainee.net, student.trainee.blocks())
    return student
