"""SD1.5's schedules against stock schedulers: what the network predicts, how the last step ends, few steps and many."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import ConfigError
from tdm_serve.models.spec import Betas
from tdm_serve.models.stock import stock_spec
from tests.tdm_serve import tiny_folders
from tests.tdm_serve.family_cases import CASES, latents, relative, spec_of, stock_pipeline, their_latents

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")

CASE = CASES["sd15-dpm"]
BETAS = Betas(0.00085, 0.012, "scaled_linear")
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = {"clip_sample": False, "timestep_spacing": "leading"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.sd15(tmp_path_factory.mktemp("sd15") / "folder")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return stock_pipeline(CASE, folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(spec_of(CASE, folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("kind", "settings", "steps", "final"),
    [
        ("DDIM", DDIM | {"set_alpha_to_one": False, "steps_offset": 1}, 4, "sigma_min"),
        ("DDIM", DDIM | {"set_alpha_to_one": False, "steps_offset": 0}, 4, "sigma_min"),
        ("DDIM", DDIM | {"set_alpha_to_one": True, "steps_offset": 1}, 5, "zero"),
        ("DPMSolverMultistep", LEADING, 4, "zero"),
        ("DPMSolverMultistep", {"final_sigmas_type": "zero"}, 16, "zero"),
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, 8, "sigma_min"),
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, 16, "sigma_min"),
        ("DPMSolverMultistep", {"timestep_spacing": "trailing"}, 1, "zero"),
    ],
)
def test_latents_are_those_of_the_stock_scheduler(
    engine: Engine, stock: Any, kind: str, settings: dict[str, Any], steps: int, final: str, prediction: str
) -> None:
    name = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = getattr(diffusers, f"{kind}Scheduler")
    plain = {"beta_start": BETAS.start, "beta_end": BETAS.end, "beta_schedule": BETAS.schedule}
    stock.scheduler = scheduler(prediction_type=name, **plain, **settings)
    stock.scheduler.set_timesteps(steps)
    times = tuple(float(time) for time in stock.scheduler.timesteps)
    betas = replace(BETAS, final=final)
    sampler = "ddim" if kind == "DDIM" else "dpmpp_2m"
    spec = replace(engine.model.spec, sampler=sampler, prediction=prediction, betas=betas)
    spec = replace(spec, times=times, sigmas=betas.sigmas(times))
    engine._specs[spec.id] = spec  # the base is the same
    request, case = Request("a red star", 3, 64, 64), replace(CASE, call={"num_inference_steps": steps})
    theirs = their_latents(stock, case, request)
    assert relative(latents(engine, request), theirs) <= 1e-4
    if final == "sigma_min":  # it makes a difference
        engine._specs[spec.id] = replace(spec, betas=BETAS)
        assert relative(latents(engine, request), theirs) > 5e-4 or times[-1] == 0.0


def test_a_stock_folder_says_how_its_last_step_ends(tmp_path: Path) -> None:
    found = tiny_folders.sd15(tmp_path / "folder")
    for kind, settings, final in (
        ("DDIM", {"set_alpha_to_one": False}, "sigma_min"),
        ("DDIM", {"set_alpha_to_one": True}, "zero"),
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, "sigma_min"),
        ("PNDM", {"set_alpha_to_one": False}, "zero"),  # sampled by DPM-Solver++, as its configuration makes it
    ):
        scheduler: Any = getattr(diffusers, f"{kind}Scheduler")(beta_schedule="scaled_linear", **settings)
        scheduler.save_pretrained(found / "scheduler")
        index = json.loads((found / "model_index.json").read_text()) | {"scheduler": ["diffusers", f"{kind}Scheduler"]}
        (found / "model_index.json").write_text(json.dumps(index))
        betas = stock_spec(found, "tiny").betas
        assert betas is not None and betas.final == final, kind


def test_an_end_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="final is 'one'; what the last step leaves is zero or sigma_min"):
        replace(BETAS, final="one").alphas()
