"""Schedules by size: the right table for the asked size, the documented rule for sizes between, bad tables refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.inspect import checkpoint_hash
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.spec import MANIFEST
from tdm_serve.sampling import flow_match_grid, solver_grid, solver_times

LIMITS = {"width": 1024, "height": 1024, "size_multiple": 16, "min_side": 256, "max_side": 1536, "max_prompt_tokens": 8}
SD3 = {
    "sampler": "dpmpp_2m",
    "grid": "solver",
    "shift": 6.0,
    "steps": 4,
    "guidance": 1.0,
    "tables": [{"width": 512, "height": 512, "shift": 3.0, "steps": 4}],
}


def written(folder: Path, version: dict[str, Any], **more: Any) -> Path:
    manifest = {"format": 1, "family": "sd3", "default": "one", "limits": LIMITS, "versions": {"one": version}} | more
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("width", "height", "shift"),
    [
        (1024, 1024, 6.0),
        (512, 512, 3.0),
        (1152, 896, 6.0),  # another ratio of the same area
        (768, 768, 6.0),  # 2.25 times the small area, 1.78 times below the large one
        (704, 704, 3.0),  # and here the small one is nearer
        (256, 256, 3.0),
        (1536, 1536, 6.0),
    ],
)
def test_a_size_takes_the_table_of_the_nearest_trained_area(
    tmp_path: Path, width: int, height: int, shift: float
) -> None:
    spec = read_spec(written(tmp_path, SD3), None, "tiny")
    sigmas, times = solver_grid(4, shift)
    rows = spec.rows(None, width, height)
    assert tuple(row.sigma for row in rows) == sigmas
    assert tuple(row.t for row in rows) == times
    assert spec.at(width, height).shift == shift


def test_without_a_size_it_is_the_table_of_the_own_size(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, SD3), None, "tiny")
    assert spec.rows() == spec.rows(None, 1024, 1024) == spec.rows(4)
    assert spec.rows() != spec.rows(None, 512, 512)


def test_another_number_of_steps_keeps_the_shift_of_the_size(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, SD3), None, "tiny")
    assert tuple(row.sigma for row in spec.rows(6, 512, 512)) == solver_grid(6, 3.0)[0]
    assert tuple(row.sigma for row in spec.rows(6, 1024, 1024)) == solver_grid(6, 6.0)[0]


def test_tables_of_a_process_with_betas(tmp_path: Path) -> None:
    betas = {"start": 0.00085, "end": 0.012, "schedule": "scaled_linear"}
    version = {
        "sampler": "ddim",
        "guidance": 1.0,
        "times": [999, 499],
        "tables": [{"width": 512, "height": 512, "times": [899, 399]}],
    }
    spec = read_spec(written(tmp_path, version, betas=betas, prediction="epsilon"), None, "tiny")
    assert [row.t for row in spec.rows(None, 512, 512)] == [899.0, 399.0]
    assert [row.t for row in spec.rows(None, 1024, 1024)] == [999.0, 499.0]


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_grid_of_stock_flow_matching(steps: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    assert flow_match_grid(steps, 3.0) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)


@pytest.mark.parametrize(("steps", "of"), [(1, 1000), (4, 1000), (20, 1000), (50, 1000), (7, 100)])
def test_the_times_of_the_solver(steps: int, of: int) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(num_train_timesteps=of)
    scheduler.set_timesteps(steps)
    assert list(solver_times(steps, of)) == scheduler.timesteps.tolist()


def test_grids_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        solver_times(0)
    with pytest.raises(ConfigError, match="nfe is 0 and shift 3"):
        flow_match_grid(0, 3.0)


def test_one_table_serves_every_size(tmp_path: Path) -> None:
    version = {"sampler": "euler", "guidance": 1.0, "sigmas": [1.0, 0.5]}
    spec = read_spec(written(tmp_path, version), None, "tiny")
    assert spec.rows(None, 256, 256) == spec.rows(None, 1024, 1024) == spec.rows()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"width": 512, "height": 512, "shift": 3.0, "steps": 5}, "other numbers of steps"),
        ({"width": 512, "height": 512, "sigmas": [0.5, 0.6, 0.2, 0.1]}, "fall strictly"),
        ({"width": 512, "shift": 3.0, "steps": 4}, "height"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_spec(written(tmp_path, SD3 | {"tables": [table]}), None, "tiny")


def test_other_tables_are_another_checkpoint(tmp_path: Path) -> None:
    first = read_spec(written(tmp_path, SD3), None, "tiny")
    other = SD3 | {"tables": [{"width": 512, "height": 512, "shift": 2.0, "steps": 4}]}
    second = read_spec(written(tmp_path, other), None, "tiny")
    assert checkpoint_hash(first, ()) != checkpoint_hash(second, ())
