"""Every family against the stock diffusers pipeline of its folder: same latents on the same schedule; NFE; company."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdm_serve.convert import convert
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError, ConfigError, PromptTooLong
from tdm_serve.models.families.table import FAMILIES, detect
from tdm_serve.models.lora.files import METADATA_KEY
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.spec import MANIFEST, Adapter, Betas, ModelSpec
from tdm_serve.sampling import sigma_grid, solver_grid
from tests.tdm_serve import tiny_folders

PROMPTS = ("a red star", "b", "9 red stars, or 4 ars!")
RANK, ALPHA = 4, 10.0

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")


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

CASES = {
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
PIXART_CALL = FOUR | {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 32}
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


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.make(tmp_path_factory.mktemp(case.family) / "folder")


@pytest.fixture(scope="module")
def stock(folder: Path, case: Case) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = case.scheduler(pipe)
    return pipe


@pytest.fixture(scope="module")
def adapter(case: Case, folder: Path, stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose alpha is not its rank, with its settings where diffusers keeps them."""
    torch.manual_seed(8)
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    for name, module in getattr(stock, case.network).named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(case.adapted):
            tensors[f"{case.network}.{name}.lora_A.weight"] = 0.2 * torch.randn(RANK, module.in_features)
            tensors[f"{case.network}.{name}.lora_B.weight"] = 0.2 * torch.randn(module.out_features, RANK)
            names.append(name)
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": names}
    metadata = {METADATA_KEY: json.dumps({f"{case.network}.{key}": value for key, value in config.items()})}
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, path, metadata | {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def engine(case: Case, folder: Path) -> Engine:
    return Engine.load(spec_of(case, folder), device="cpu", dtype="float32")


def latents(engine: Engine, *requests: Request) -> Tensor:
    samples = engine.start(requests)
    while not samples[0].done:
        engine.step(samples)
    return torch.cat([sample.latents for sample in samples])


def their_latents(stock: Any, case: Case, request: Request) -> Tensor:
    result = stock(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance or 1.0,
        width=request.width,
        height=request.height,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        **case.call,
    )
    return result.images


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


ASKED = (
    Request(PROMPTS[0], 1, 64, 64),
    Request(PROMPTS[1], 2, 96, 48),
    Request(PROMPTS[2], 3, 48, 144),
    Request(PROMPTS[0], 4, 64, 64, guidance=3.5, negative_prompt="4 bs"),
)


@pytest.mark.parametrize("request_", ASKED)
def test_latents_are_those_of_stock_diffusers(case: Case, engine: Engine, stock: Any, request_: Request) -> None:
    ours, theirs = latents(engine, request_), their_latents(stock, case, request_)
    assert ours.shape == theirs.shape
    assert relative(ours, theirs) <= 1e-4
    assert theirs.std() > 0.1


def test_pictures_are_those_of_stock_diffusers(case: Case, engine: Engine, stock: Any) -> None:
    ours = np.asarray(engine.generate([ASKED[0]])[0].image).astype(int)
    random = torch.Generator("cpu").manual_seed(ASKED[0].seed)
    theirs = stock(PROMPTS[0], guidance_scale=1.0, width=64, height=64, generator=random, **case.call).images[0]
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1
    assert ours.std() > 1


@pytest.mark.parametrize("adapters", ["alone", "fused", "separate"])
def test_with_an_adapter_too(
    case: Case, folder: Path, stock: Any, engine: Engine, adapter: Path, adapters: str
) -> None:
    """Alone in the base weights, or as one of two versions that share the base."""
    specs = [spec_of(case, folder, adapter, "adapted"), spec_of(case, folder)]
    if adapters != "alone" and not FAMILIES[case.family].shares:
        with pytest.raises(ConfigError, match="serves one version of a base at a time; 2 were named"):
            Engine.load(specs)
        return
    chosen = specs[:1] if adapters == "alone" else specs
    ours = Engine.load(chosen, device="cpu", dtype="float32", adapters=adapters.replace("alone", "fused"))
    plain = latents(engine, ASKED[0])
    got = latents(ours, ASKED[0], *([replace(ASKED[0], model="tiny")] if adapters != "alone" else []))
    with adapted(stock, case, adapter):
        expected = their_latents(stock, case, ASKED[0])
    assert relative(got[:1], expected) <= 1e-4
    assert relative(plain, expected) > 1e-2  # the adapter does something
    assert adapters == "alone" or relative(got[1:], plain) <= 1e-6


def test_evaluations_are_counted(engine: Engine) -> None:
    """Guidance off costs one evaluation a step, on two: whatever the company."""
    short = replace(ASKED[0], steps=3, allow_untrained_schedule=True)
    for request_, expected in ((ASKED[0], 4), (ASKED[3], 8), (short, 3)):
        calls = engine.denoise.evaluations
        [image] = engine.generate([request_])
        assert image.nfe == engine.denoise.evaluations - calls == expected


def test_company_changes_no_bit(engine: Engine) -> None:
    """Other prompts, seeds, step counts and guided neighbours; on a CPU in strict mode, its default."""
    sizes = [replace(request_, width=64, height=64) for request_ in ASKED]
    mixed = [*sizes, replace(sizes[1], steps=2, allow_untrained_schedule=True), replace(sizes[3], guidance=0.5, seed=9)]
    together = [image.image.tobytes() for image in engine.generate(mixed)]
    assert together == [engine.generate([request_])[0].image.tobytes() for request_ in mixed]


def test_without_strict_mode_company_changes_little(case: Case, folder: Path, engine: Engine) -> None:
    """Latents of one forward against latents alone: rounding, grown by the network's random weights."""
    loose = Engine.load(spec_of(case, folder), device="cpu", dtype="float32", strict=False)
    asked = [replace(ASKED[0], seed=seed, prompt=PROMPTS[seed % 3]) for seed in range(5)]
    together = latents(loose, *asked)
    for row, request_ in zip(together.split(1), asked, strict=True):
        assert relative(row, latents(engine, request_)) <= 1e-4


def test_a_prompt_beyond_the_limit_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptTooLong, match="reads at most"):
        engine.check(replace(ASKED[0], prompt="9 " * 40))


def test_previews_have_the_size_of_the_picture(engine: Engine) -> None:
    assert engine.preview(latents(engine, ASKED[1])).size == (96, 48)


def test_the_folder_says_its_family(case: Case, folder: Path, tmp_path: Path) -> None:
    assert detect(folder) == case.family
    with pytest.raises(CheckpointError, match=r"family 'zimage', but its model_index.json is of"):
        Engine.load(replace(spec_of(case, folder), family="zimage"))
    with pytest.raises(CheckpointError, match="only zimage checkpoints are converted"):
        convert(folder, tmp_path / "out") if (folder / MANIFEST).exists() else _convert_with_manifest(
            case, folder, tmp_path
        )


def _convert_with_manifest(case: Case, folder: Path, tmp_path: Path) -> None:
    write_manifest(case, folder)
    try:
        convert(folder, tmp_path / "out")
    finally:
        (folder / MANIFEST).unlink()


def write_manifest(case: Case, folder: Path) -> None:
    spec = spec_of(case, folder)
    limits = {name: getattr(spec, name) for name in ("width", "height", "size_multiple", "min_side", "max_side")}
    betas = spec.betas
    version = {name: getattr(spec, name) for name in ("sampler", "shift", "sigmas", "guidance", "times", "grid")}
    manifest = {
        "format": 1,
        "family": case.family,
        "limits": limits | {"max_prompt_tokens": 32},
        "default": "tiny",
        "versions": {"tiny": version},
        "prediction": spec.prediction,
    }
    if betas is not None:
        manifest["betas"] = {name: getattr(betas, name) for name in ("start", "end", "schedule", "steps")}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_manifest_says_all_of_a_spec(case: Case, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="its sigma table is unknown"):
        Engine.load(folder)
    write_manifest(case, folder)
    try:
        assert read_spec(folder, None, "tiny") == spec_of(case, folder)
    finally:
        (folder / MANIFEST).unlink()


def test_of_pixart_only_512_pixels_are_read(tmp_path: Path) -> None:
    folder = tiny_folders.pixart(tmp_path / "large", sample_size=128)
    with pytest.raises(CheckpointError, match="of PixArt only 512 pixels are read"):
        Engine.load(spec_of(CASES["pixart-ddim"], folder))


def test_an_unknown_pipeline_class_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match=r"is a FluxPipeline, .* known are ZImagePipeline \(zimage\), ") as caught:
        detect(tmp_path)
    assert all(entry.pipeline in str(caught.value) for entry in FAMILIES.values())
