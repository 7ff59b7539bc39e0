"""Puts toy_trainee.py, which tests of the trainers share, and its rewards where they are found by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent

sys.path.append(str(FOLDER))  # --import-mode=importlib leaves the path alone


@pytest.fixture(scope="session")
def toy_rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an installed package, as far as its entry points go: the toy's rewards."""
    from toy_trainee import ENTRY_POINTS

    folder = tmp_path_factory.mktemp("installed")
    described = folder / "toy_trainee-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-trainee\nVersion: 1\n")
    (described / "entry_points.txt").write_text(ENTRY_POINTS)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def toy_environment(environment: dict[str, str], toy_rewards: Path) -> dict[str, str]:
    """For processes that a test starts: they find the toy and its rewards, too."""
    paths = [environment["PYTHONPATH"], str(FOLDER), str(toy_rewards)]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def closed_trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the reward threads of every TDM-R1 trainer that a test makes."""
    from tdm_finetune.tdm_r1 import Reinforcement

    made: list[Reinforcement] = []
    start = Reinforcement.__init__

    def remember(self: Reinforcement, *arguments: Any) -> None:
        start(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Reinforcement, "__init__", remember)
    yield
    for trainer in made:
        trainer.close()
