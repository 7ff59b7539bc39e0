"""One training run as a process: its folder, its command, how far it is, and what it says when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdm_app.settings import PREFIX

GRACE_S = 10.0  # between asking a process to end and ending it
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LAST_BYTES = 20_000  # of a log, in which its last words are


@dataclass(frozen=True, slots=True)
class Folder:
    """Everything of one training. `run` is the trainer's own folder, with file names that docs/training.md tells."""

    path: Path

    @property
    def ratings(self) -> Path:
        """What it learns from; there while it runs."""
        return self.path / "ratings.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter.safetensors"

    @property
    def version(self) -> Path:
        return self.run / "version.json"

    @property
    def checkpoint(self) -> Path:
        """What comes of it: a checkpoint like any other."""
        return self.path / "checkpoint"

    def progress(self) -> tuple[int, int]:
        """Updates that are done, as far as they are told, and of all; (0, 0) before the trainer has begun."""
        try:
            total = int(json.loads((self.run / "config.json").read_text())["config"]["steps"])
        except (OSError, ValueError, KeyError):
            return 0, 0
        try:
            lines = (self.run / "log.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"]), total
        except (OSError, ValueError, KeyError, IndexError):
            return 0, total

    def forget(self) -> None:
        """Removes what people said, and what only a resume needs."""
        self.ratings.unlink(missing_ok=True)
        for path in (self.run / "state.pt", self.run / "tensorboard"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def command(folder: Folder, config: str, checkpoint: str, steps: int) -> list[str]:
    """The trainer's command line. `steps` are the evaluations of the version that it starts from."""
    settings = {"config": config, "checkpoint": checkpoint, "feedback": folder.ratings, "run": folder.run, "nfe": steps}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "tdm_app.online.child", "finetune", "tdm-r1", *flags]


def environment(threads: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """With a number of threads of its own, and without the service's secrets."""
    kept = {name: value for name, value in inherited.items() if name.upper() != f"{PREFIX}ADMIN_KEY"}
    return kept | dict.fromkeys(THREADS, str(threads)) | {"OMP_WAIT_POLICY": "PASSIVE"}


async def begin(folder: Folder, arguments: Sequence[str], threads: int) -> asyncio.subprocess.Process:
    """Starts the process, which writes all that it says to the log. It ends when the server does."""
    with folder.log.open("ab") as log:
        log.write(f"$ {' '.join(arguments)}\n".encode())
        log.flush()
        return await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment(threads, os.environ),
            start_new_session=True,  # Ctrl+C is for the server, which then ends this
        )


async def stop(process: asyncio.subprocess.Process) -> None:
    """Asks it to end, and ends it if that takes too long."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), GRACE_S)
        except TimeoutError:
            process.kill()
    await process.wait()


def last_words(folder: Folder, code: int) -> str:
    """Why it failed: the trainer's own sentence where it had one."""
    if code < 0:
        return f"the trainer was ended by {signal.Signals(-code).name}; its log in the state folder has the rest"
    try:
        with folder.log.open("rb") as file:
            file.seek(max(0, folder.log.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if re.match(r"error: |\w*(Error|Exception)\b", line)]
    if said:
        return said[-1].removeprefix("error: ")
    return f"the trainer ended with code {code}; its log in the state folder has the rest"


def version_entry(folder: Folder, ratings: int, model: str) -> dict[str, Any]:
    """What the trainer says of its adapter, for the manifest."""
    entry: dict[str, Any] = json.loads(folder.version.read_text())
    return entry | {"description": f"{entry['description']} From {ratings} ratings of {model}."}
