"""One case for each family and kind of schedule: its tiny folder, its table, and how stock diffusers samples it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from tdm_serve.core import Request
from tdm_serve.engine import Engine, by_shape
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.spec import Adapter, Betas, ModelSpec
from tdm_serve.sampling import sigma_grid, solver_grid
from tests.tdm_serve import tiny_folders

PROMPTS = ("a red star", "b", "9 red stars, or 4 ars!")
RANK, ALPHA = 4, 10.0


@dataclass(frozen=True)
class Case:
    """One family's folder and how stock diffusers samples it."""

    make: Callable[[Path], Path]
    family: str
    spec: dict[str, Any]
    call: dict[str, Any]  # of the stock pipeline
    scheduler: Callable[[Any], Any]
    adapted: tuple[str, ...]  # endings of the linears that the adapter changes
    network: str = "transformer"


def _dpm_flow(pipe: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=6.0)


def _euler(pipe: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


SD3_LINEARS = ("attn.to_q", "attn.to_out.0", "attn.add_v_proj", "attn2.to_k", "ff.net.2", "norm1.linear")
SOLVER = dict(zip(("sigmas", "times"), solver_grid(4, 6.0), strict=True))
SD3_DPM = {"sampler": "dpmpp_2m", "shift": 6.0, "grid": "solver", **SOLVER}
SD3_EULER = {"sampler": "euler", "shift": 3.0, "sigmas": sigma_grid(4, 3.0)}
SD3_CALL = {"num_inference_steps": 4, "max_sequence_length": 32}
EULER_CALL = {"sigmas": [1.0, 0.75, 0.5, 0.25], "max_sequence_length": 32}

Z_IMAGE_LINEARS = ("attention.to_q", "attention.to_out.0", "feed_forward.w2", "adaLN_modulation.0", "cap_embedder.1")
Z_IMAGE = {"sampler": "euler", "shift": 3.0, "sigmas": sigma_grid(4, 3.0), "max_prompt_tokens": 96}
CASES = {
    "zimage": Case(
        tiny_folders.zimage,
        "zimage",
        Z_IMAGE,
        EULER_CALL | {"max_sequence_length": 96},
        lambda pipe: pipe.scheduler,
        Z_IMAGE_LINEARS,
    ),
    "sd35-dpm": Case(tiny_folders.sd3, "sd3", SD3_DPM, SD3_CALL, _dpm_flow, SD3_LINEARS),
    "sd35-euler": Case(tiny_folders.sd3, "sd3", SD3_EULER, EULER_CALL, _euler, SD3_LINEARS),
    "sd3-without-t5": Case(
        lambda folder: tiny_folders.sd3(folder, t5=False, dual=False), "sd3", SD3_DPM, SD3_CALL, _dpm_flow, SD3_LINEARS
    ),
}


BETAS = Betas(0.00085, 0.012, "scaled_linear")


def _vp(sampler: str, *times: float, betas: Betas = BETAS) -> dict[str, Any]:
    table = {"times": times, "sigmas": betas.sigmas(times), "shift": 1.0}
    return {"sampler": sampler, "prediction": "epsilon", "betas": betas} | table


def _ddim(pipe: Any) -> Any:
    return diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=1
    )


UNET_LINEARS = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2", "time_emb_proj")
FOUR = {"num_inference_steps": 4}
CASES |= {
    "sd15-dpm": Case(
        tiny_folders.sd15,
        "sd15",
        _vp("dpmpp_2m", 999.0, 749.0, 500.0, 250.0),
        FOUR,
        lambda pipe: pipe.scheduler,
        UNET_LINEARS,
        "unet",
    ),
    "sd15-ddim": Case(
        tiny_folders.sd15, "sd15", _vp("ddim", 751.0, 501.0, 251.0, 1.0), FOUR, _ddim, UNET_LINEARS, "unet"
    ),
}

PIXART_LINEARS = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2", "adaln_single.linear")
PIXART_CALL = FOUR | {"use_resolution_binning": False, "max_sequence_length": 32}
LINEAR = Betas(0.0001, 0.02)
CASES |= {
    "pixart-dpm": Case(
        tiny_folders.pixart,
        "pixart",
        _vp("dpmpp_2m", 999.0, 749.0, 500.0, 250.0, betas=LINEAR),
        PIXART_CALL,
        lambda pipe: pipe.scheduler,
        PIXART_LINEARS,
    ),
    "pixart-ddim": Case(
        tiny_folders.pixart,
        "pixart",
        _vp("ddim", 751.0, 501.0, 251.0, 1.0, betas=LINEAR),
        PIXART_CALL,
        _ddim,
        PIXART_LINEARS,
    ),
}


def spec_of(case: Case, folder: Path, adapter: Path | None = None, name: str = "tiny") -> ModelSpec:
    values = {
        "id": name,
        "family": case.family,
        "base": folder,
        "version": name,
        "adapters": () if adapter is None else (Adapter(adapter),),
        "guidance": 1.0,
        "width": 64,
        "height": 64,
        "size_multiple": 16,
        "min_side": 32,
        "max_side": 192,
        "max_prompt_tokens": 32,
        "description": "",
    }
    return ModelSpec(**(values | case.spec))


ASKED = (
    Request(PROMPTS[0], 1, 64, 64),
    Request(PROMPTS[1], 2, 96, 48),
    Request(PROMPTS[2], 3, 48, 144),
    Request(PROMPTS[0], 4, 64, 64, guidance=3.5, negative_prompt="4 bs"),
)


def latents(engine: Engine, *requests: Request) -> Tensor:
    """Of requests of one size and step count."""
    samples = engine.start(requests)
    while not samples[0].done:
        for group in by_shape(samples):
            engine.step(group)
    return torch.cat([sample.latents for sample in samples])


def their_latents(stock: Any, case: Case, *requests: Request) -> Tensor:
    """Of one call for requests that differ in prompts and seeds."""
    first = requests[0]
    result = stock(
        [request.prompt for request in requests],
        negative_prompt=[request.negative_prompt for request in requests],
        guidance_scale=(first.guidance or 1.0) - 1.0 + FAMILIES[case.family].guidance_off,
        width=first.width,
        height=first.height,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        output_type="latent",
        **case.call,
    )
    return result.images


def stock_pipeline(case: Case, folder: Path) -> Any:
    """The stock pipeline of a folder, quiet, with the case's scheduler."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = case.scheduler(pipe)
    return pipe


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@contextmanager
def adapted(stock: Any, case: Case, adapter: Path) -> Iterator[None]:
    """The stock pipeline with a LoRA, by its own loader, or by PEFT where it has none."""
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(adapter)
        yield
        stock.unload_lora_weights()
        return
    plain, prefix = getattr(stock, case.network), f"{case.network}."
    state = {key.removeprefix(prefix): value for key, value in load_file(adapter).items()}
    names = {key.split(".lora_")[0] for key in state}
    network = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names), deepcopy(plain))
    assert not set_peft_model_state_dict(network, state).unexpected_keys
    setattr(stock, case.network, network.eval())
    yield
    setattr(stock, case.network, plain)
