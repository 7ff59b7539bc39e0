"""What requests may ask of every family: guidance that is free when off, schedules, adapter scales, cut prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import ConfigError, InvalidRequest, PromptTooLong
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.lora import read_base
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.spec import MANIFEST, Adapter
from tdm_serve.validation import scale_of, weight_of
from tests.tdm_serve.family_cases import ASKED, CASES, Case, latents, relative, spec_of, stock_pipeline, their_latents

FAMILY = {case.family: case for case in reversed(CASES.values())}  # the first case of each
SHARED = [name for name in FAMILY if FAMILIES[name].shares]
PLAIN, GUIDED = replace(ASKED[0], guidance=None), ASKED[3]
LONG = "9 red stars, 4 ars and a b " * 12

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny folder of each family."""
    assert set(FAMILY) == set(FAMILIES)
    return {name: case.make(tmp_path_factory.mktemp(name) / "folder") for name, case in FAMILY.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    """One version of each family, distilled, without guidance."""
    return {name: Engine.load(spec_of(FAMILY[name], folder), device="cpu") for name, folder in folders.items()}


@pytest.fixture(params=FAMILY)
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


# Guidance


@contextmanager
def counted(engine: Engine) -> Iterator[list[int]]:
    """The batch of each call of the network itself."""
    batches: list[int] = []
    hook = engine.model.denoiser.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    yield batches
    hook.remove()


@pytest.mark.parametrize(
    ("more", "each"), [(None, 1), (0.0, 1), (1.5, 2)], ids=["by default", "turned off", "turned on"]
)
def test_guidance_that_is_off_costs_one_evaluation_a_step(engine: Engine, more: float | None, each: int) -> None:
    """`more` is what the guidance scale is above the family's off."""
    off = FAMILIES[engine.info.family].guidance_off
    asked = replace(PLAIN, guidance=None if more is None else weight_of(off + more, off))
    with counted(engine) as batches:
        [image] = engine.generate([asked])
    assert sum(batches) == image.nfe == 4 * each
    assert engine.check(asked).guided == (each == 2)


def test_guidance_of_a_guided_version_can_be_turned_off(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        guided = Engine.load(replace(spec_of(FAMILY[name], folder), guidance=4.0), device="cpu")
        off = guided.info.guidance_off
        for asked, expected in ((PLAIN, 8), (replace(PLAIN, guidance=weight_of(off, off)), 4)):
            with counted(guided) as batches:
                guided.generate([asked])
            assert sum(batches) == expected
        assert (off, scale_of(guided.info.guidance, off)) == ((0.0, 3.0) if name == "zimage" else (1.0, 4.0))


def test_a_negative_prompt_is_refused_where_nothing_reads_it(engine: Engine) -> None:
    off = engine.info.guidance_off
    for guidance, why in ((None, "tiny has no guidance by itself"), (weight_of(off, off), "guidance is turned off")):
        with pytest.raises(InvalidRequest, match=f"'blur', but {why}, so nothing would read it") as caught:
            engine.check(replace(PLAIN, guidance=guidance, negative_prompt="blur"))
        assert caught.value.param == "negative_prompt"


def test_conventions() -> None:
    assert [weight_of(scale, 0.0) for scale in (0, 0.5, 2, 30)] == [1.0, 1.5, 3.0, 31.0]
    assert [weight_of(scale, 1.0) for scale in (0, 0.5, 1, 3, 30)] == [1.0, 1.0, 1.0, 3.0, 30.0]
    for off, scale in itertools.product((0.0, 1.0), (1.0, 4.5, 7.3)):
        assert scale_of(weight_of(scale, off), off) == scale
    for scale in (-0.1, 30.1, float("nan")):
        with pytest.raises(InvalidRequest, match=r"between 0 and 30; 1 turns it off") as caught:
            weight_of(scale, 1.0)
        assert caught.value.param == "guidance"


# Schedules


@pytest.mark.parametrize("steps", [1, 3, 5, 100])
def test_a_few_step_version_is_tied_to_its_schedule(engine: Engine, steps: int) -> None:
    with pytest.raises(
        InvalidRequest, match=f"steps is {steps}, but tiny was trained for 4; .*allow_untrained"
    ) as caught:
        engine.check(replace(PLAIN, steps=steps))
    assert caught.value.param == "steps"
    engine.check(replace(PLAIN, steps=steps, allow_untrained_schedule=True))
    engine.check(replace(PLAIN, steps=4))


def test_a_picture_on_another_schedule_says_so_and_is_made_again(engine: Engine) -> None:
    [image] = engine.generate([replace(PLAIN, steps=2, allow_untrained_schedule=True)])
    assert image.untrained_schedule and image.recipe()["untrained_schedule"] is True
    [again] = engine.generate([Request.from_recipe(json.loads(json.dumps(image.recipe())))])
    assert (again.recipe(), again.image.tobytes()) == (image.recipe(), image.image.tobytes())
    [usual] = engine.generate([replace(PLAIN, steps=4, allow_untrained_schedule=True)])
    assert not usual.untrained_schedule and "untrained_schedule" not in usual.recipe()


def test_a_multi_step_version_takes_any_count(folders: dict[str, Path]) -> None:
    spec = replace(spec_of(FAMILY["zimage"], folders["zimage"]), free_steps=True)
    [image] = Engine.load(spec, device="cpu").generate([replace(PLAIN, steps=2)])
    assert (image.nfe, image.untrained_schedule) == (2, False)


@pytest.mark.parametrize(
    ("version", "free"),
    [
        ({"guidance": 7.0}, True),  # a base, in a manifest that is older than the field
        ({"guidance": 1.0}, False),  # distilled, and the adapter fused
        ({"guidance": 7.0, "adapter": "lora.safetensors"}, False),
        ({"guidance": 7.0, "free_steps": False}, False),
        ({"guidance": 1.0, "adapter": "lora.safetensors", "free_steps": True}, True),
    ],
)
def test_a_manifest_says_whether_a_version_is_tied(tmp_path: Path, version: dict[str, Any], free: bool) -> None:
    sizes = ("width", "height", "size_multiple", "min_side", "max_side", "max_prompt_tokens")
    table = {"sampler": "euler", "shift": 3.0, "sigmas": [1.0, 0.75]}
    versions = {"one": table | version}
    manifest = {
        "format": 1,
        "family": "zimage",
        "default": "one",
        "limits": dict.fromkeys(sizes, 64),
        "versions": versions,
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert read_spec(tmp_path, None, "one").free_steps is free


# The strength of an adapter


def adapter(folder: Path, path: Path, seed: int) -> Path:
    """A LoRA on every linear that versions can share, those of times and texts among them."""
    base, random = read_base(folder), torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out, *into) in base.layers.items():
        if len(into) == 1 and not name.startswith(("t_embedder", "time_text_embed", "pos_embed")):
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, into[0], generator=random) * 0.1
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 2, generator=random) * 0.1
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=SHARED)
def pair(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path, tuple[Adapter, ...]]:
    """A family, its folder and two adapters of one version, which have strengths of their own."""
    folder, files = folders[request.param], tmp_path_factory.mktemp("loras")
    one, two = (adapter(folder, files / f"{seed}.safetensors", seed) for seed in (1, 2))
    return FAMILY[request.param], folder, (Adapter(one, scale=0.5), Adapter(two, scale=-1.5))


@pytest.fixture(scope="module")
def separate(pair: tuple[Case, Path, tuple[Adapter, ...]]) -> Engine:
    """The version and its base."""
    case, folder, adapters = pair
    spec = spec_of(case, folder)
    return Engine.load([replace(spec, id="adapted", adapters=adapters), spec], device="cpu", adapters="separate")


@pytest.mark.parametrize("asked", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("strength", [0.3, 1.7])
def test_a_strength_is_that_of_the_adapters_in_the_weights(
    pair: tuple[Case, Path, tuple[Adapter, ...]], separate: Engine, asked: Request, strength: float
) -> None:
    case, folder, adapters = pair
    weaker = tuple(replace(one, scale=strength * one.scale) for one in adapters)
    expected = latents(Engine.load(replace(spec_of(case, folder), adapters=weaker), device="cpu"), asked)
    got = latents(separate, replace(asked, adapter_scale=strength))
    assert relative(got, expected) <= 1e-4
    assert relative(latents(separate, asked), expected) > 1e-2


def test_strengths_share_a_batch_and_no_cache(separate: Engine) -> None:
    """Each row is bit by bit what it is alone in an engine that has made nothing else; 0 is the base, 1 the default."""
    strengths = (1.0, 0.25, 0.0, None, 4.0, 0.25)
    for asked in (PLAIN, GUIDED):
        rows = [replace(asked, adapter_scale=strength) for strength in strengths]
        mixed = latents(separate, *rows, replace(asked, model="tiny")).split(1)
        assert torch.equal(mixed[0], mixed[3]) and torch.equal(mixed[2], mixed[-1]) and torch.equal(mixed[1], mixed[5])
        for one, other in itertools.combinations([mixed[0], mixed[1], mixed[2], mixed[4]], 2):
            assert relative(one, other) > 1e-3
        for row, alone in zip(mixed, rows, strict=False):
            separate.cache.clear()
            assert torch.equal(row, latents(separate, alone))


def test_refined_text_is_kept_by_strength(separate: Engine) -> None:
    separate.cache.clear()
    asked = replace(PLAIN, adapter_scale=0.5)
    separate.start([asked])
    found = [separate.look(replace(PLAIN, adapter_scale=strength))[1] for strength in (0.5, 0.51, None)]
    assert found == [True, False, False]


def test_a_strength_is_in_the_recipe_where_it_is_not_the_usual_one(separate: Engine) -> None:
    weak, usual = separate.generate([replace(PLAIN, adapter_scale=strength) for strength in (0.5, 1.0)])
    assert weak.recipe()["adapter_scale"] == 0.5 and "adapter_scale" not in usual.recipe()
    [again] = separate.generate([Request.from_recipe(weak.recipe())])
    assert again.image.tobytes() == weak.image.tobytes() and again.recipe() == weak.recipe()


def test_one_version_alone_may_have_its_adapter_separate(
    pair: tuple[Case, Path, tuple[Adapter, ...]], separate: Engine
) -> None:
    case, folder, adapters = pair
    spec = replace(spec_of(case, folder), id="adapted", adapters=adapters)
    alone = Engine.load(spec, device="cpu", adapters="separate")
    asked = replace(PLAIN, adapter_scale=0.25)
    assert torch.equal(latents(alone, asked), latents(separate, asked))
    assert alone.info.adapter == "separate"


def test_a_strength_that_cannot_be_had_is_refused(
    pair: tuple[Case, Path, tuple[Adapter, ...]], separate: Engine
) -> None:
    case, folder, adapters = pair
    fused = Engine.load(replace(spec_of(case, folder), adapters=adapters), device="cpu")
    asked = replace(PLAIN, adapter_scale=0.5)
    for engine, request, said in (
        (fused, asked, r'tiny has its adapter in its weights; .*adapters "separate"'),
        (separate, replace(asked, model="tiny"), r"adapter_scale is 0\.5, but tiny has no adapter; leave it out"),
        (
            separate,
            replace(asked, adapter_scale=-0.5),
            r"adapter_scale is -0\.5; it must be between 0, the base, and 10",
        ),
        (separate, replace(asked, adapter_scale=10.1), r"adapter_scale is 10\.1; it must be"),
        (separate, replace(asked, adapter_scale=float("nan")), "adapter_scale is nan; it must be"),
    ):
        with pytest.raises(InvalidRequest, match=said) as caught:
            engine.check(request)
        assert caught.value.param == "adapter_scale"


def test_a_family_that_keeps_no_adapter_apart_says_so(folders: dict[str, Path]) -> None:
    for name in FAMILY.keys() - SHARED:
        with pytest.raises(ConfigError, match=f'family {name!r} adds adapters to its weights; adapters "separate" is'):
            Engine.load(spec_of(FAMILY[name], folders[name]), device="cpu", adapters="separate")


def test_an_exported_engine_has_no_adapter_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'separate', but an exported engine has its adapter in its weights"):
        Engine.load("default", engine=tmp_path, adapters="separate")


# Prompts that are too long


def test_a_prompt_is_cut_as_stock_cuts_it(engine: Engine, folders: dict[str, Path]) -> None:
    case = FAMILY[engine.info.family]
    asked = replace(PLAIN, prompt=LONG)
    with pytest.raises(PromptTooLong, match="truncate_prompt"):
        engine.check(asked)
    ours = latents(engine, replace(asked, truncate_prompt=True))
    assert relative(ours, their_latents(stock_pipeline(case, folders[case.family]), case, asked)) <= 1e-4
    assert relative(ours, latents(engine, replace(asked, prompt="b"))) > 1e-3


def test_a_cut_prompt_is_reported(engine: Engine) -> None:
    asked = replace(GUIDED, truncate_prompt=True)
    long, away, whole = engine.generate(
        [replace(asked, prompt=LONG), replace(asked, negative_prompt=LONG), asked],
    )
    assert [image.truncated for image in (long, away, whole)] == [True, True, False]
    assert long.recipe()["truncated"] is True and "truncated" not in whole.recipe()
    [again] = engine.generate([Request.from_recipe(away.recipe())])
    assert (again.recipe(), again.image.tobytes()) == (away.recipe(), away.image.tobytes())
    with pytest.raises(PromptTooLong) as caught:
        engine.check(replace(asked, negative_prompt=LONG, truncate_prompt=False))
    assert caught.value.param == "negative_prompt"
