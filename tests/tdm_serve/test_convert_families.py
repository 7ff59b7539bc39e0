"""A converted checkpoint of every family: its stock pipeline, called as the folder says, draws the same picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tdm_serve import Pipeline
from tdm_serve.convert import convert, usage
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError
from tdm_serve.models.described import described_base, described_version
from tdm_serve.models.lora import Delta, Lora, read_base, write_lora
from tdm_serve.models.manifest import read_spec, spec_of
from tdm_serve.models.spec import MANIFEST, Adapter, Betas, ModelSpec, Table
from tdm_serve.sampling import flow_match_grid, sigma_grid, solver_grid
from tdm_serve.stock_call import stock_call
from tests.tdm_serve.family_cases import ASKED, CASES, PROMPTS, Case
from tests.tdm_serve.family_cases import spec_of as spec_of_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*requires torchvision.*"),
    pytest.mark.filterwarnings("ignore:.*steps_offset.*:FutureWarning"),
]


def lora(case: Case, folder: Path, path: Path) -> Path:
    """A LoRA that is seen in every picture."""
    base, random = read_base(folder), torch.Generator().manual_seed(3)
    deltas: dict[str, Delta] = {}
    for name in [name for name in base.layers if name.endswith(case.adapted)]:
        out, into = base.layers[name]
        a, b = torch.randn(4, into, generator=random), torch.randn(out, 4, generator=random)
        deltas[name] = Delta(0.2 * a, 0.2 * b, 2.5)
    return write_lora(Lora(deltas, "made"), path, base.component)


def picture(result: Any) -> np.ndarray[Any, Any]:
    return np.asarray(result).astype(int)


def stock_picture(folder: Path) -> np.ndarray[Any, Any]:
    """What the folder's stock pipeline draws, with nothing known but the folder."""
    stock = json.loads((folder / MANIFEST).read_text())["versions"]["tiny"]["stock"]
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **stock["load"])
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator("cpu").manual_seed(7)
    return picture(pipe(PROMPTS[0], generator=random, **stock["call"]).images[0])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if "dpm" in n else pytest.mark.slow) for n in CASES])
def test_stock_draws_the_same_picture(name: str, guidance: float, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.make(tmp_path / "folder")
    spec = replace(spec_of_case(case, folder, lora(case, folder, tmp_path / "lora.safetensors")), guidance=guidance)
    out = convert(spec, tmp_path / "out")
    engine, plain = Engine.load(spec, device="cpu"), Engine.load(replace(spec, adapters=()), device="cpu")
    asked = replace(ASKED[0], seed=7)
    ours, base = (picture(one.generate([asked])[0].image) for one in (engine, plain))
    assert np.abs(ours - stock_picture(out)).max() <= 1
    assert np.abs(ours - base).max() > 1 and ours.std() > 1
    again = Pipeline.from_pretrained(out, device="cpu")
    assert np.abs(picture(again(PROMPTS[0], seed=7)[0].image) - ours).max() <= 1
    assert again.info.nfe == engine.generate([asked])[0].nfe
    assert usage(out).startswith(json.loads((folder / "model_index.json").read_text())["_class_name"])


FLOW = {"sampler": "euler", "shift": 3.0, "sigmas": sigma_grid(4, 3.0)}
ODD = (1.0, 0.8, 0.3)
TABLES = {
    "even": ("zimage", FLOW, {"num_inference_steps": 4}),
    "odd": ("zimage", FLOW | {"sigmas": ODD}, {"sigmas": list(ODD)}),
    "even-sd3": ("sd3", FLOW, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    "odd-sd3": ("sd3", FLOW | {"sigmas": ODD}, {"sigmas": list(ODD)}),
    "stock-sd3": ("sd3", FLOW | {"sigmas": flow_match_grid(5, 3.0)}, {"num_inference_steps": 5}),
}


def made(family: str, **values: Any) -> ModelSpec:
    """A spec of nothing."""
    case = replace(next(iter(CASES.values())), family=family, spec={})
    return spec_of_case(replace(case, spec={"grid": "linear", **values}), Path("nowhere"))


@pytest.mark.parametrize("name", TABLES)
def test_a_flow_table_is_given_where_the_scheduler_does_not_make_it(name: str) -> None:
    family, values, expected = TABLES[name]
    call = stock_call(made(family, **values))
    assert {key: call.arguments[key] for key in expected} == expected
    given = call.arguments.get("sigmas")
    if family == "zimage" and given is None:
        given = [1.0 - i / 4 for i in range(4)]  # as its pipeline does
    call.scheduler.set_timesteps(**({"sigmas": given} if given else {"num_inference_steps": len(values["sigmas"])}))
    assert call.scheduler.sigmas.tolist() == pytest.approx([*values["sigmas"], 0.0], abs=1e-6)
    assert call.scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in values["sigmas"]], abs=1e-3)


def test_guidance_is_told_in_the_familys_convention() -> None:
    values = FLOW | {"guidance": 3.5}
    assert stock_call(made("zimage", **values)).arguments["guidance_scale"] == 2.5
    assert stock_call(made("sd3", **values)).arguments["guidance_scale"] == 3.5


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": "dpmpp_2m", "shift": 3.0, "sigmas": ODD},
        {"sampler": "dpmpp_2m", "shift": 3.0, "sigmas": sigma_grid(4, 3.0)},
        {"sampler": "euler", "shift": 3.0, "sigmas": ODD, "times": (900.0, 700.0, 10.0)},
    ],
)
def test_a_table_that_stock_cannot_be_given(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="tiny was trained on a table that stock diffusers cannot be configured"):
        stock_call(made("sd3", **values))


SPECS: dict[str, Callable[[], ModelSpec]] = {
    "flow": lambda: made("sd3", **FLOW),
    "by size": lambda: made(
        "sd3",
        sampler="dpmpp_2m",
        grid="solver",
        shift=6.0,
        **dict(zip(("sigmas", "times"), solver_grid(4, 6.0), strict=True)),
        tables=(Table(64, 64, 6.0, *solver_grid(4, 6.0)), Table(32, 32, 3.0, *solver_grid(4, 3.0))),
        adapters=(Adapter(Path("nowhere/a.ckpt"), 0.5, "ema-list", 32, 64.0, ("to_q",)), Adapter(Path("nowhere/b"))),
    ),
    "epsilon": lambda: made(
        "sd15",
        sampler="ddim",
        shift=1.0,
        prediction="v",
        betas=Betas(0.001, 0.02, final="sigma_min"),
        times=(899.0, 400.0),
        sigmas=Betas(0.001, 0.02).sigmas((899.0, 400.0)),
        free_steps=True,
        preview=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_described_spec_reads_back(name: str, tmp_path: Path) -> None:
    """Through JSON, as a folder's manifest."""
    spec = replace(SPECS[name](), base=tmp_path)
    version = described_version(spec, lambda adapter: adapter.path.name)
    manifest = described_base(spec) | {"versions": {"tiny": version}, "default": "tiny"}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    moved = tuple(replace(one, path=tmp_path / one.path.name) for one in spec.adapters)
    assert read_spec(tmp_path, None, "tiny") == replace(spec, adapters=moved)
    assert spec_of({**manifest, **version}, tmp_path, "tiny", "tiny", moved) == replace(spec, adapters=moved)
