"""A training run's folder: config, JSON-lines log, atomic state, resume. Shared by every trainer."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from tdm_serve.errors import CheckpointError, ConfigError, OutputError
from tdm_serve.files import write_atomically
from tdm_serve.machine import stamp

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"
CONFIG_FILE = "config.json"
VERSION_FILE = "version.json"  # what a distillation run says of its adapter, for the checkpoint's manifest
BOARD_FOLDER = "tensorboard"


class Run:
    """One trainer's folder. Everything that a resumed run needs is in `state.pt`, written beside and renamed.

    Of several processes one `leads`; the others read the state and write nothing.
    """

    def __init__(
        self, folder: Path, config: Any, *, total_steps: int, every: int = 50, leads: bool = True, board: bool = False
    ) -> None:
        self.folder, self.leads = folder, leads
        self.config = as_json(config)
        self.total_steps = total_steps
        self.every = every
        self.step = 0
        self._elapsed_before_s = 0.0
        self._started = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        if leads:
            self._guard_config()
        self._board: Any = None
        self._wants_board = board and leads
        self._bar = tqdm(total=total_steps, disable=not (leads and sys.stderr.isatty()), desc=folder.name)

    def _guard_config(self) -> None:
        path = self.folder / CONFIG_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the run folder {self.folder}: {error.strerror or error}") from error
        if not path.exists():
            write_atomically(path, json.dumps({"config": self.config, "machine": stamp()}, indent=1).encode())
            return
        before = json.loads(path.read_text())["config"]
        changed = [
            f"{key}: {before.get(key)!r} -> {self.config.get(key)!r}"
            for key in sorted(before.keys() | self.config.keys())
            if before.get(key) != self.config.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run with another config ({'; '.join(changed)}); "
                "resume with the same config or name another --run folder"
            )

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier sittings included."""
        return self._elapsed_before_s + time.perf_counter() - self._started

    def resume(self) -> dict[str, Any] | None:
        """The saved state of an interrupted run, or None. Restores the step and the random generators."""
        path = self.folder / STATE_FILE
        state = self._restored(path) if path.exists() else None
        if self.leads:
            self._forget_the_lost_steps()
        return state

    def _restored(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.step = int(state["step"])
        self._elapsed_before_s = float(state["elapsed_s"])
        torch.set_rng_state(state["torch_rng"])
        self._bar.update(self.step)
        logger.info("resuming %s at step %d of %d", self.folder, self.step, self.total_steps)
        return state

    def _forget_the_lost_steps(self) -> None:
        """What a killed run logged after its last state is done again, and must not be in the curves twice."""
        log = self.folder / LOG_FILE
        with self._writing():
            if log.is_file():
                before = log.read_text()
                kept = "".join(f"{line}\n" for line in before.splitlines() if _step_of(line) <= self.step)
                if kept != before:
                    write_atomically(log, kept.encode())
            if self._wants_board:
                self._board = _board(self.folder / BOARD_FOLDER, self.step + 1)

    def save(self, **state: Any) -> None:
        """Writes everything a resume needs; a crash or a full disk leaves the previous state intact."""
        if not self.leads:
            return
        whole = {"step": self.step, "elapsed_s": self.elapsed_s, "torch_rng": torch.get_rng_state(), **state}
        temporary = self.folder / f".{STATE_FILE}.{os.getpid()}"
        try:
            _write_state(whole, temporary)
            temporary.replace(self.folder / STATE_FILE)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"the state at step {self.step} cannot be written to {self.folder}: {error}; "
                f"the one before it is intact in {self.folder / STATE_FILE}"
            ) from error

    def advance(self, scalars: Mapping[str, float]) -> None:
        """Counts one optimiser step and logs the mean of its scalars every `every` steps."""
        self.step += 1
        self._bar.update()
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.step % self.every == 0 or self.step == self.total_steps:
            means = {name: value / self._counts[name] for name, value in self._sums.items()}
            self._sums, self._counts = {}, {}
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
            self.log(means)

    def log(self, values: Mapping[str, Any]) -> None:
        """One JSON line, floats to six digits; numbers also as TensorBoard scalars."""
        if not self.leads:
            return
        row: dict[str, Any] = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1)}
        row |= {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}
        with self._writing():
            with (self.folder / LOG_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(name, value, self.step)

    def picture(self, name: str, sheet: NDArray[np.uint8]) -> None:
        """A contact sheet (H, W, 3): `name.png` in the folder, and TensorBoard's history of it."""
        if not self.leads:
            return
        with self._writing():
            Image.fromarray(sheet).save(self.folder / f"{name}.png")
            if self._board is not None:
                self._board.add_image(name, sheet, self.step, dataformats="HWC")

    @contextmanager
    def _writing(self) -> Generator[None]:
        """A full disk may show in any of the files first."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write to the run folder {self.folder}: {error.strerror or error}; the last state is intact"
            ) from error

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:  # this may be the way out from a clearer error
                logger.warning("the last TensorBoard events of %s are lost: %s", self.folder, error)


def _step_of(line: str) -> float:
    """The step of a row; infinite for a line that a kill cut off."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _board(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer that hides earlier events from `first_step` on."""
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def _write_state(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def as_json(config: Any) -> dict[str, Any]:
    """A config dataclass as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def finished(path: Path, stage: str) -> Path:
    """The file or folder that a run of `stage` has written; CheckpointError if it has not."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; `tdm-serve finetune {stage}` writes it at its end")
    return path


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch. Data streams take the seed explicitly and never these."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def cosine(step: int, total: int, warmup: int, floor: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))


def trapezoid(step: int, total: int, warmup: int, decay: int) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero over the last `decay` steps.

    Unlike a cosine it lets a run that turned out too short be continued from its constant phase.
    """
    return min(1.0, (step + 1) / warmup, (total - step) / decay)
