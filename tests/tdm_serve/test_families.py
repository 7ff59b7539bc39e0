"""Every family against the stock diffusers pipeline of its folder: same latents on the same schedule; NFE; company."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tdm_serve.core import Request
from tdm_serve.engine import Engine, by_shape
from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.families.table import FAMILIES, detect
from tdm_serve.models.lora.files import METADATA_KEY
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.spec import MANIFEST
from tests.tdm_serve import tiny_folders
from tests.tdm_serve.family_cases import (
    ALPHA,
    ASKED,
    CASES,
    PROMPTS,
    RANK,
    Case,
    adapted,
    latents,
    relative,
    spec_of,
    stock_pipeline,
    their_latents,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")
LONG = "9 red stars, or 4 ars beside a blue one"  # with its template 64 tokens after padding
LONGER = LONG + ", and then 3 more of them in a row"  # 96


SCHEDULES = ("sd35-euler", "sd15-ddim", "pixart-ddim")  # other schedules of families that are tried in full


@pytest.fixture(scope="module", params=[name for name in CASES if name not in SCHEDULES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.make(tmp_path_factory.mktemp(case.family) / "folder")


@pytest.fixture(scope="module")
def stock(folder: Path, case: Case) -> Any:
    return stock_pipeline(case, folder)


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


@pytest.mark.parametrize("request_", ASKED)
def test_latents_are_those_of_stock_diffusers(case: Case, engine: Engine, stock: Any, request_: Request) -> None:
    ours, theirs = latents(engine, request_), their_latents(stock, case, request_)
    assert ours.shape == theirs.shape
    assert relative(ours, theirs) <= 1e-4
    assert theirs.std() > 0.1


@pytest.mark.parametrize("case", SCHEDULES, indirect=True)
@pytest.mark.parametrize("request_", [ASKED[2], ASKED[3]])
def test_on_other_schedules_too(case: Case, engine: Engine, stock: Any, request_: Request) -> None:
    assert relative(latents(engine, request_), their_latents(stock, case, request_)) <= 1e-4


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_a_batch_is_stocks_batch(case: Case, engine: Engine, stock: Any, guidance: float | None) -> None:
    """Prompts of other lengths in one call; where stock masks padding between them, its rows may not notice."""
    away = ("4 bs", "", "a") if guidance else ("", "", "")
    pairs = enumerate(zip(PROMPTS, away, strict=True))
    asked = [Request(prompt, seed, 64, 96, guidance=guidance, negative_prompt=kept) for seed, (prompt, kept) in pairs]
    assert relative(latents(engine, *asked), their_latents(stock, case, *asked)) <= 1e-4


def test_pictures_are_those_of_stock_diffusers(case: Case, engine: Engine, stock: Any) -> None:
    ours = np.asarray(engine.generate([ASKED[0]])[0].image).astype(int)
    random = torch.Generator("cpu").manual_seed(ASKED[0].seed)
    off = FAMILIES[case.family].guidance_off
    theirs = stock(PROMPTS[0], guidance_scale=off, width=64, height=64, generator=random, **case.call).images[0]
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


def test_previews_have_the_size_of_the_picture(engine: Engine) -> None:
    assert engine.preview(latents(engine, ASKED[1])).size == (96, 48)


def test_the_folder_says_its_family(case: Case, folder: Path) -> None:
    assert detect(folder) == case.family
    other = "sd15" if case.family == "zimage" else "zimage"
    with pytest.raises(CheckpointError, match=rf"family '{other}', but its model_index.json is of"):
        Engine.load(replace(spec_of(case, folder), family=other))


@pytest.mark.parametrize("case", ["zimage"], indirect=True)
def test_an_engine_that_mixes_lengths_makes_the_same_pictures(case: Case, folder: Path, engine: Engine) -> None:
    """As on a GPU: captions of 32, 64 and 96 tokens share a shape where the picture is large beside them."""
    spec = replace(spec_of(case, folder), max_side=512)
    mixing = Engine.load(spec, device="cpu", dtype="float32", strict=False)
    assert mixing.check(Request(PROMPTS[0], 1, 512, 512)).text == 32  # what a CPU does by itself
    mixing._mixes = True
    small, large = (
        [Request(text, 1, side, side, guidance=guidance) for text in (PROMPTS[0], LONG, LONGER)]
        for side, guidance in ((64, None), (512, 2.0))
    )
    assert [mixing.check(one).text for one in small] == [32, 64, 96]
    assert [mixing.check(one).text for one in large] == [64, 64, 96]
    samples = mixing.start(large)
    assert [len(group) for group in by_shape(samples)] == [2, 1]
    alone = [latents(Engine.load(spec, device="cpu", dtype="float32"), one) for one in large[:2]]
    assert relative(latents(mixing, *large)[:2], torch.cat(alone)) <= 1e-4


def write_manifest(case: Case, folder: Path) -> None:
    spec = spec_of(case, folder)
    limits = {name: getattr(spec, name) for name in ("width", "height", "size_multiple", "min_side", "max_side")}
    betas = spec.betas
    version = {name: getattr(spec, name) for name in ("sampler", "shift", "sigmas", "guidance", "times", "grid")}
    manifest = {
        "format": 1,
        "family": case.family,
        "limits": limits | {"max_prompt_tokens": spec.max_prompt_tokens},
        "default": "tiny",
        "versions": {"tiny": version},
        "prediction": spec.prediction,
    }
    if betas is not None:
        manifest["betas"] = {name: getattr(betas, name) for name in ("start", "end", "schedule", "steps", "final")}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_manifest_says_all_of_a_spec(case: Case, folder: Path) -> None:
    write_manifest(case, folder)
    try:
        assert read_spec(folder, None, "tiny") == spec_of(case, folder)
    finally:
        (folder / MANIFEST).unlink()


@pytest.mark.parametrize("case", ["zimage"], indirect=True)
@pytest.mark.parametrize(("prompt", "away"), [(LONG, ""), (LONG, "4 bs"), (PROMPTS[0], LONG), (LONG, LONGER)])
def test_captions_of_several_padded_lengths(case: Case, engine: Engine, stock: Any, prompt: str, away: str) -> None:
    """32, 64 and 96 tokens, alone and as a guided pair, in which each text has its own padding and the rest is cut."""
    assert [engine.model.check_prompt(text) for text in (PROMPTS[0], LONG, LONGER)] == [32, 64, 96]
    asked = Request(prompt, 5, 64, 96, guidance=3.5, negative_prompt=away)
    assert relative(latents(engine, asked), their_latents(stock, case, asked)) <= 1e-4
    plain = replace(asked, guidance=None, negative_prompt="")
    mixed = [plain, replace(plain, prompt=PROMPTS[1], seed=6)]
    assert relative(latents(engine, *mixed), their_latents(stock, case, *mixed)) <= 1e-4


def test_of_pixart_only_512_pixels_are_read(tmp_path: Path) -> None:
    folder = tiny_folders.pixart(tmp_path / "large", sample_size=128)
    with pytest.raises(CheckpointError, match="of PixArt only 512 pixels are read"):
        Engine.load(spec_of(CASES["pixart-ddim"], folder))


def test_an_unknown_pipeline_class_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match=r"is a FluxPipeline, .* known are ZImagePipeline \(zimage\), ") as caught:
        detect(tmp_path)
    assert all(entry.pipeline in str(caught.value) for entry in FAMILIES.values())
